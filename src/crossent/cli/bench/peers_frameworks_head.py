"""Who computes the head: crossent from NumPy and from PyTorch, PyTorch in four ways, and JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import crossent
from crossent.cli.bench.head_problem import HeadProblem
from crossent.cli.bench.peers import Arrays, Contender, Peer, Unserved, as_arrays
from crossent.cli.bench.peers_frameworks import (
    OnInductor,
    OnJAX,
    OnTorch,
    as_tensor,
    from_tensors,
)

_Loss = Callable[[Any, Any, Any], Any]


def our_heads(problem: HeadProblem) -> list[Contender]:
    """Return crossent's call from NumPy."""
    x, weight, target, wrt = problem.x, problem.weight, problem.target, problem.wrt
    if problem.task == "loss":
        return [Contender("none", lambda: crossent.linear_cross_entropy(x, weight, target))]

    def value_and_grad() -> tuple[Any, ...]:
        found = crossent.linear_cross_entropy_value_and_grad(x, weight, target, wrt=wrt)
        return found.loss, *(part for part in found.grad if part is not None)

    return [Contender("fresh", value_and_grad)]


def head_peers() -> list[Peer[HeadProblem]]:
    """Return who else there is, installed or not."""
    return [OurHead(), EagerHead(), CompiledHead(), PlainHead(), ChunkedHead(), JittedHead()]


def _torch_head(loss_of: _Loss, problem: HeadProblem) -> Contender:
    """Time a loss of x, W and target, through the backward pass if that is the task.

    Each contender has leaves of its own on the same memory. The gradients are handed over, not
    left in the leaves, so that no contender holds memory while another has its turn.
    """
    import torch

    x, weight = as_tensor(problem.x), as_tensor(problem.weight)
    target = torch.from_numpy(problem.target)
    if problem.task == "loss":

        def value() -> Any:
            with torch.inference_mode():
                return loss_of(x, weight, target)

        return Contender("none", value, from_tensors)
    leaves = [weight] if problem.frozen else [x, weight]
    for leaf in leaves:
        leaf.requires_grad_()

    def step() -> tuple[Any, ...]:
        loss = loss_of(x, weight, target)
        loss.backward()
        found = (loss, *(leaf.grad for leaf in leaves))
        for leaf in leaves:
            leaf.grad = None
        return found

    return Contender("fresh", step, from_tensors)


def _plain_loss(x: Any, weight: Any, target: Any) -> Any:
    from torch.nn import functional

    return functional.cross_entropy(functional.linear(x, weight), target)


class OurHead(OnTorch):
    """The head of this library, from PyTorch."""

    name = "crossent-torch"
    title = "crossent.torch"
    package = "crossent"
    how = "crossent.torch.linear_cross_entropy(x, W, target).backward(), eager"

    def contenders(self, problem: HeadProblem) -> list[Contender]:
        """Return the step."""
        from crossent.torch import linear_cross_entropy

        return [_torch_head(linear_cross_entropy, problem)]


class EagerHead(OnTorch):
    """PyTorch's layer and loss, one after the other."""

    how = "cross_entropy(linear(x, W), target).backward(), of torch.nn.functional"

    def contenders(self, problem: HeadProblem) -> list[Contender]:
        """Return the step."""
        return [_torch_head(_plain_loss, problem)]


class CompiledHead(OnInductor):
    """The same, compiled for these shapes by Inductor with a C++ compiler."""

    compiles = True

    def contenders(self, problem: HeadProblem) -> list[Contender]:
        """Return the compiled step."""
        import torch
        from torch.nn import functional

        def loss_of(x: Any, weight: Any, target: Any) -> Any:
            return functional.cross_entropy(functional.linear(x, weight), target)

        torch._dynamo.reset()  # it compiles a function for eight shapes and no more
        return [_torch_head(torch.compile(loss_of, fullgraph=True, dynamic=False), problem)]


class PlainHead(OnTorch):
    """PyTorch's function of the same name as ours, as it is without options."""

    name = "torch-linear"
    title = "torch, linear_cross_entropy"
    how = "torch.nn.functional.linear_cross_entropy(x, W, target).backward()"

    def contenders(self, problem: HeadProblem) -> list[Contender]:
        """Return the step."""
        return [_torch_head(_torch_linear(chunked=False), problem)]


class ChunkedHead(OnTorch):
    """The same, which takes a chunk of rows at a time and does not hold the logits."""

    name = "torch-chunked"
    title = "torch, chunked"
    how = "the same with options=torch.nn.LinearCrossEntropyOptions(): PyTorch chooses the chunks"

    def contenders(self, problem: HeadProblem) -> list[Contender]:
        """Return the step."""
        return [_torch_head(_torch_linear(chunked=True), problem)]


def _torch_linear(chunked: bool) -> _Loss:
    import torch
    from torch.nn import functional

    if not hasattr(functional, "linear_cross_entropy"):
        raise Unserved(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return functools.partial(_by_torch, functional.linear_cross_entropy, options)


def _by_torch(function: Any, options: Any, x: Any, weight: Any, target: Any) -> Any:
    return function(x, weight, target, options=options)


class JittedHead(OnJAX):
    """JAX with Optax's loss, compiled by XLA."""

    how = (
        "jax.jit(jax.value_and_grad(…)) of optax.softmax_cross_entropy_with_integer_labels(x @ W.T,"
        " target).mean(), block_until_ready; inputs on the device before; XLA starts a thread for "
        "each usable CPU"
    )
    compiles = True

    def contenders(self, problem: HeadProblem) -> list[Contender]:
        """Return the compiled function of the task."""
        import jax
        import optax

        problem.require_dtype("float32", "float16", "bfloat16")

        def loss(x: Any, weight: Any, target: Any) -> Any:
            each = optax.softmax_cross_entropy_with_integer_labels(x @ weight.T, target)
            return each.mean()

        of = (1,) if problem.frozen else (0, 1)
        alone = problem.task == "loss"
        compiled = jax.jit(loss if alone else jax.value_and_grad(loss, argnums=of))
        target = problem.target.astype(np.int32)
        given = jax.device_put((problem.x, problem.weight, target))

        def call() -> Any:
            return jax.block_until_ready(compiled(*given))

        return [Contender("none", call) if alone else Contender("fresh", call, _flat)]


def _flat(result: Any) -> Arrays:
    loss, grads = result
    return as_arrays((loss, *grads))


def torch_products(
    a: NDArray[Any], b: NDArray[Any], threads: int
) -> list[tuple[str, str, Callable[[], Any]]]:
    """Return PyTorch's ways to multiply two matrices: name, title and call of each."""
    import torch

    torch.set_num_threads(threads)
    p, q = torch.from_numpy(a), torch.from_numpy(b)
    found: list[tuple[str, str, Callable[[], Any]]] = [("torch", "torch.mm", lambda: p @ q)]
    if torch.backends.mkldnn.is_available():

        def linear() -> Any:
            return torch.ops.mkldnn._linear_pointwise(p, q, None, "none", [], "")

        found.append(("mkldnn", "torch, oneDNN's linear", linear))
    return found

"""The peers with arrays and compilers of their own: PyTorch, eager and compiled, and JAX."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from crossent.cli.bench.peers import Arrays, Contender, Problem, Task, Unserved


def _torch_function(problem: Problem) -> Callable[[Any, Any], Any]:
    from torch.nn import functional

    axis = problem.axis
    functions: dict[Task, Callable[[Any, Any], Any]] = {
        "loss+gradient": functional.cross_entropy,
        "loss": functional.cross_entropy,
        "softmax": lambda z, _: functional.softmax(z, axis),
        "log_softmax": lambda z, _: functional.log_softmax(z, axis),
    }
    if problem.task not in functions:
        raise Unserved("has no such function")
    if problem.axis not in (1, -1 if problem.logits.ndim == 2 else 1):
        raise Unserved("takes classes on axis 1 only")
    return functions[problem.task]


def _torch_contender(function: Callable[[Any, Any], Any], problem: Problem) -> Contender:
    """Time a function of logits and target, through the backward pass if that is the task."""
    import torch

    logits, target = as_tensor(problem.logits), torch.from_numpy(problem.target)
    if problem.task == "loss+gradient":
        leaf = logits.requires_grad_()

        def value_and_grad() -> tuple[Any, Any]:
            loss = function(leaf, target)
            (grad,) = torch.autograd.grad(loss, leaf)
            return loss, grad

        return Contender("fresh", value_and_grad, from_tensors)

    def value() -> Any:
        with torch.inference_mode():
            return function(logits, target)

    return Contender("none" if problem.task == "loss" else "fresh", value, from_tensors)


def as_tensor(array: Any) -> Any:
    """Return the tensor on an array's memory; bfloat16 as PyTorch's."""
    import torch

    if array.dtype.name != "bfloat16":
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def from_tensors(result: Any) -> Arrays:
    """Return a result, one tensor or a tuple of them, as arrays; bfloat16 as float32."""
    import torch

    def one(tensor: Any) -> Any:
        tensor = tensor.detach()
        return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()

    return tuple(map(one, result if isinstance(result, tuple) else (result,)))


class OnTorch:
    """What runs in PyTorch."""

    name = "torch"
    title = "torch"
    package = "torch"
    modules: tuple[str, ...] = ("torch",)

    def prepare(self, threads: int) -> None:
        """Set the number of threads."""
        import torch

        torch.set_num_threads(threads)


class OnInductor(OnTorch):
    """What Inductor compiles with a C++ compiler."""

    name = "torch-compile"
    title = "torch.compile"
    how = "the same under torch.compile(fullgraph=True, dynamic=False), forward and backward"

    def prepare(self, threads: int) -> None:
        """Set the number of threads, and keep Inductor's workers from running beside the timing."""
        from torch._inductor import config

        super().prepare(threads)
        config.compile_threads = 1


class OnJAX:
    """What XLA compiles."""

    name = "jax"
    title = "JAX"
    package = "jax"
    modules: tuple[str, ...] = ("jax", "optax")

    def prepare(self, threads: int) -> None:
        """Keep to the CPU; as many threads as the process may use CPUs start with the backend."""
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no advice about slow compilation
        import jax

        jax.config.update("jax_platforms", "cpu")


class Eager(OnTorch):
    """PyTorch, one operation after the other."""

    how = "torch.nn.functional.cross_entropy, torch.autograd.grad in a leaf; set_num_threads(N)"

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the function of the task."""
        return [_torch_contender(_torch_function(problem), problem)]


class Compiled(OnInductor):
    """PyTorch, compiled for these shapes by Inductor with a C++ compiler."""

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the compiled function of the task."""
        import torch

        function = _torch_function(problem)
        torch._dynamo.reset()  # it compiles a function for eight shapes and no more
        compiled = torch.compile(lambda z, t: function(z, t), fullgraph=True, dynamic=False)
        return [_torch_contender(compiled, problem)]


class Jitted(OnJAX):
    """JAX with Optax's loss, compiled by XLA."""

    how = (
        "jax.jit(jax.value_and_grad(optax.softmax_cross_entropy_with_integer_labels(…).mean())), "
        "block_until_ready; inputs on the device before; XLA starts a thread for each usable CPU"
    )

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the compiled function of the task."""
        import jax
        import optax

        problem.require_dtype("float32", "float16", "bfloat16")
        axis = problem.axis

        def loss(z: Any, t: Any) -> Any:
            return optax.softmax_cross_entropy_with_integer_labels(z, t, axis=axis).mean()

        functions: dict[Task, Callable[[Any, Any], Any]] = {
            "loss+gradient": jax.value_and_grad(loss),
            "loss": loss,
            "softmax": lambda z, _: jax.nn.softmax(z, axis=axis),
            "log_softmax": lambda z, _: jax.nn.log_softmax(z, axis=axis),
        }
        if problem.task not in functions:
            raise Unserved("has no such function")
        compiled = jax.jit(functions[problem.task])
        logits, target = jax.device_put((problem.logits, problem.target.astype(np.int32)))
        call = functools.partial(_finished, compiled, logits, target)
        return [Contender("none" if problem.task == "loss" else "fresh", call)]


def _finished(function: Callable[[Any, Any], Any], logits: Any, target: Any) -> Any:
    import jax

    return jax.block_until_ready(function(logits, target))

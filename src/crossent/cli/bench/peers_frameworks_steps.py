"""PyTorch's side of `crossent bench torch-rows`: a loss and its backward pass, as a training loop.

Each contender has a leaf of its own on the memory of the logits, so each frees its own gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crossent.cli.bench.peers import Contender, Peer, Problem
from crossent.cli.bench.peers_frameworks import OnInductor, OnTorch, as_tensor, from_tensors

_Loss = Callable[[Any, Any], Any]


def our_step(problem: Problem) -> list[Contender]:
    """Return the step with `crossent.torch.cross_entropy`, eager.

    It comes first for each problem, and so has Dynamo forget what it compiled for the one before:
    it keeps eight versions of a function, and tries one after the other in each call.
    """
    import torch

    torch.set_num_threads(problem.threads)
    torch._dynamo.reset()
    return [_step(_our_loss(), problem)]


def step_peers() -> list[Peer[Problem]]:
    """Return who else takes the step, installed or not."""
    return [EagerStep(), CompiledStep(), OurCompiledStep()]


def _step(loss_of: _Loss, problem: Problem) -> Contender:
    import torch

    x = as_tensor(problem.logits).requires_grad_()
    target = torch.from_numpy(problem.target)

    def step() -> tuple[Any, Any]:
        x.grad = None
        loss = loss_of(x, target)
        loss.backward()
        return loss, x.grad

    return Contender("fresh", step, from_tensors)


def _compiled_step(loss_of: _Loss, problem: Problem) -> Contender:
    import torch

    return _step(torch.compile(loss_of, fullgraph=True, dynamic=False), problem)


def _our_loss() -> _Loss:
    from crossent.torch import cross_entropy

    found: _Loss = cross_entropy
    return found


class EagerStep(OnTorch):
    """PyTorch's loss, one operation after the other."""

    how = "torch.nn.functional.cross_entropy(x, target).backward(); set_num_threads(N)"

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the step."""
        from torch.nn import functional

        return [_step(functional.cross_entropy, problem)]


class CompiledStep(OnInductor):
    """PyTorch's loss, compiled for these shapes by Inductor with a C++ compiler."""

    how = "the same under torch.compile(fullgraph=True, dynamic=False), forward and backward"

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the compiled step."""
        from torch.nn import functional

        return [_compiled_step(functional.cross_entropy, problem)]


class OurCompiledStep(OnInductor):
    """The loss of this library within a compiled graph."""

    name = "crossent-compile"
    title = "crossent, compiled"
    package = "crossent"
    how = "crossent.torch.cross_entropy under torch.compile(fullgraph=True, dynamic=False)"

    def contenders(self, problem: Problem) -> list[Contender]:
        """Return the compiled step."""
        return [_compiled_step(_our_loss(), problem)]

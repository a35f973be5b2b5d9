"""Make one seed's call after the other and judge what comes back."""

from __future__ import annotations

import faulthandler
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from arrays import CANARY, owner, snapshot
from cases import Case, make
from oracle import Expected

import crossent
from crossent import _native

HANG_SECONDS = 60


def check(case: Case) -> str | None:
    """Make the call; return what is wrong with it, or None."""
    function = getattr(crossent, case.function)
    _native.set_isa(case.random.choice(_native.available_isas()))
    _native.set_num_threads(case.random.choice((1, 1, 1, 2, 3)))
    out = case.kwargs.get("out")
    watched = [*case.args, *(a for name, a in case.kwargs.items() if name != "out")]
    in_place = isinstance(out, np.ndarray) and any(
        isinstance(a, np.ndarray) and np.may_share_memory(a, out) for a in watched
    )
    before = None if in_place else [snapshot(a) for a in watched]
    kept_args = case.args
    if in_place:  # the logits are gone after the call
        kept_args = [a.copy() if isinstance(a, np.ndarray) else a for a in case.args]
    try:
        got = function(*case.args, **case.kwargs)
    except (TypeError, ValueError, IndexError) as error:
        text = str(error)
        if not text.startswith(f"{case.function}: "):
            return f"{type(error).__name__} without the function's name: {text}"
        if case.wrong == ["target range"] and not case.unsure and not isinstance(error, IndexError):
            return f"{type(error).__name__} instead of IndexError: {text}"
        if not case.wrong and not case.unsure:
            return f"a right call raised {type(error).__name__}: {text}"
        if before is not None and before != [snapshot(a) for a in watched]:
            return "an input changed before an error"
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-4)}"
    if case.wrong:
        return f"a wrong call passed: {', '.join(case.wrong)}"
    if before is not None and before != [snapshot(a) for a in watched]:
        return "an input changed"
    if isinstance(out, np.ndarray):
        if got.grad is not out:
            return "grad is not out"
        if not in_place and (text := _beside(out)):
            return text
    case.args = kept_args
    for text in compare(Expected(case), case, got):
        if text:
            return f"{case.function} {text}"
    if not in_place and (case.random.random() < 0.03 or case.n_classes > 65536):
        return _threads_matter(function, case, got)
    return None


def compare(expected: Expected, case: Case, got: Any) -> Iterator[str | None]:
    """Hold a result to the exact one, and its types to the documented ones."""
    name = case.function
    if name in ("softmax", "log_softmax"):
        yield _kind(got, case.dtype)
        yield from expected.softmax(got, log=name == "log_softmax")
    elif name == "softmax_jacobian":
        yield _kind(got, case.compute_dtype)
        yield from expected.jacobian(got)
    elif name == "cross_entropy":
        yield _kind(got, case.compute_dtype)
        yield from expected.loss(got)
    elif name == "cross_entropy_value_and_grad":
        yield _kind(got.loss, case.compute_dtype)
        yield _kind(got.grad, case.dtype)
        yield from expected.loss(*got)
    elif name == "cross_entropy_hvp":
        yield _kind(got, case.dtype)
        yield from expected.hvp(got)
    elif name == "cross_entropy_hessian":
        yield _kind(got, case.compute_dtype)
        yield from expected.hessian(got)
    else:
        yield _kind(got.logsumexp, case.compute_dtype) or _kind(got.entropy, case.compute_dtype)
        yield _kind(got.argmax, np.dtype(np.int64))
        yield from expected.stats(got)


def _kind(got: Any, dtype: np.dtype[Any]) -> str | None:
    if not isinstance(got, np.ndarray | np.generic):
        return f"is a {type(got).__name__}, not an array or a NumPy scalar"
    return None if got.dtype == dtype else f"has dtype {got.dtype}, expected {dtype}"


def _beside(out: Any) -> str | None:
    """Tell whether the memory between `out`'s elements is as it was."""
    whole = owner(out)
    if not isinstance(whole, np.ndarray) or whole.dtype != np.uint8:
        return None
    kept = whole.copy()
    there = out.copy()
    out[...] = np.frombuffer(bytes([CANARY]) * out.itemsize, out.dtype)[0]
    same = bool((whole == CANARY).all())
    whole[...] = kept
    out[...] = there
    return None if same else "wrote beside out"


def _threads_matter(function: Any, case: Case, got: Any) -> str | None:
    _native.set_num_threads(case.random.choice((1, 2, 4)))
    again = function(*case.args, **case.kwargs)
    first = got if isinstance(got, tuple) else (got,)
    second = again if isinstance(again, tuple) else (again,)
    for a, b in zip(first, second, strict=True):
        if (a is None) != (b is None) or (a is not None and a.tobytes() != b.tobytes()):
            return "other bits with another number of threads"
    return None


def describe(case: Case) -> str:
    """The call, as one would write it."""

    def text(value: Any) -> str:
        if isinstance(value, np.ndarray):
            flags = "" if value.flags.writeable else ", read-only"
            head = f"<{value.dtype} {value.shape}, strides {value.strides}{flags}>"
            return head if value.size > 24 else f"{head} {value.tolist()}"
        return repr(value)

    named = [f"{name}={text(value)}" for name, value in case.kwargs.items()]
    return f"{case.function}({', '.join([*map(text, case.args), *named])})"


def run(begin: int, end: int, at: Any, findings: Any, show: bool = False) -> None:
    """Check the seeds [begin, end); `at` always holds the current one."""
    warnings.simplefilter("error")
    for seed in range(begin, end):
        at.value = seed
        if seed % 256 == 0 or seed == begin:
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        text = None
        try:
            case = make(seed)
            if show:
                print(describe(case), "\nwrong:", case.wrong, "unsure:", case.unsure)
            text = check(case)
        except BaseException:  # an error of this program is a finding as well
            text = "while checking: " + traceback.format_exc(limit=-3)
        if text:
            findings.put((seed, text))
    faulthandler.cancel_dump_traceback_later()

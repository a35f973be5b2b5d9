"""One seed, one call: a public function and its arguments, some of them wrong on purpose."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from arrays import FLOATS, INTEGERS, NONSENSE, converted, laid_out, values

FUNCTIONS = (
    ("cross_entropy_value_and_grad", 36),
    ("cross_entropy", 16),
    ("softmax", 9),
    ("log_softmax", 9),
    ("cross_entropy_stats", 12),
    ("cross_entropy_hvp", 12),
    ("cross_entropy_hessian", 3),
    ("softmax_jacobian", 3),
)
SMALL_V = (1, 2, 3, 5, 7, 8, 9, 10)
TAIL_V = (15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 65, 66, 127, 130, 250, 257)
SHORT_V = (300, 511, 512, 513, 600, 1000, 1025, 2047, 2049, 4095, 4096)  # one block of floats
BLOCK_V = (4097, 4100, 8193, 12289)
PART_V = (65537, 66000, 70001)  # one such row is served in parts by several threads
WRONG_NUMBERS = (float("nan"), float("inf"), -1.0, "0.1", None, True, 1j, [0.1], np.ones(2))


@dataclass
class Case:
    """A call, and what is known of it: `wrong` names what must make it raise."""

    seed: int
    function: str = ""
    args: list[Any] = field(default_factory=list)
    kwargs: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    unsure: bool = False  # may raise or not
    shape: tuple[int, ...] = ()
    axis: int = -1
    dtype: np.dtype[Any] | None = None  # what the logits are computed from; None: nonsense
    random: Random = field(default_factory=Random)
    numbers: Any = None

    @property
    def rows_shape(self) -> tuple[int, ...]:
        """Shape of one number a row."""
        axis = self.axis % len(self.shape)
        return self.shape[:axis] + self.shape[axis + 1 :]

    @property
    def n_classes(self) -> int:
        """V."""
        return self.shape[self.axis]

    @property
    def compute_dtype(self) -> np.dtype[Any]:
        """What the kernels compute in, by the design page."""
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)


def make(seed: int) -> Case:
    """The case of `seed`."""
    random = Random(seed)
    case = Case(seed, random=random, numbers=np.random.Generator(np.random.PCG64(seed)))
    names, weights = zip(*FUNCTIONS, strict=True)
    case.function = random.choices(names, weights)[0]
    _logits(case)
    if case.function in ("softmax", "log_softmax", "softmax_jacobian"):
        return case
    _options(case)
    _target(case)
    if case.function == "cross_entropy_hvp":
        _vector(case)
    if case.function in ("cross_entropy_value_and_grad", "cross_entropy_hvp"):
        _grad_output(case)
    if case.function == "cross_entropy_value_and_grad" and random.random() < 0.35:
        _out(case)
    return case


def _logits(case: Case) -> None:
    random = case.random
    pairs = case.function in ("cross_entropy_hessian", "softmax_jacobian")
    kind = random.random()
    n_classes = random.choice(
        SMALL_V if kind < 0.58 or pairs
        else TAIL_V if kind < 0.95
        else SHORT_V if kind < 0.985
        else BLOCK_V if kind < 0.999
        else PART_V
    )  # fmt: skip
    if random.random() < 0.01:
        n_classes = 0
    ndim = random.choices((1, 2, 3, 4, 5), (10, 60, 18, 8, 4))[0]
    limit = 6 if n_classes < 12 else 3 if n_classes < 300 else 1
    if ndim in (2, 3) and random.random() < 0.2 and n_classes < 5000 and not pairs:
        # Several tiles, several tasks; in three dimensions many columns, from an outer index on.
        many = 200 if n_classes < 49 and random.random() < 0.3 else 40 if n_classes < 300 else 20
        limit = many if ndim == 2 else 14 if n_classes < 49 else limit
    rows = [random.randint(1, limit) if ndim < 4 else random.randint(1, 2) for _ in range(ndim - 1)]
    if rows and random.random() < 0.03:
        rows[random.randrange(len(rows))] = 0
    position = ndim - 1
    if not pairs and random.random() < 0.35:
        position = random.randrange(ndim)
    if case.function == "softmax_jacobian":
        position = ndim - 1
    z = values(random, case.numbers, (*rows, n_classes))
    z = np.moveaxis(z, -1, position)
    name = random.choices((*FLOATS, "integer", "nonsense"), (40, 26, 11, 10, 9, 2))[0]
    dtype = FLOATS.get(name)
    if name == "integer":
        dtype = random.choice(INTEGERS)
    elif name == "nonsense":
        dtype = random.choice(NONSENSE)
        case.wrong.append("input dtype")
    given = laid_out(random, converted(z, dtype))
    case.shape = z.shape
    case.args = [given]
    if name != "nonsense":
        got = np.asarray(given).dtype
        case.dtype = np.dtype(np.float64) if got.kind in "iu" else got.newbyteorder("=")
    if n_classes == 0:
        case.wrong.append("no classes")
    if random.random() < 0.004:
        case.args = [random.choice((1.0, None, "a", np.float32(3), {}))]
        case.shape, position, ndim = (1,), 0, 1
        case.wrong.append("input of no array")
    case.axis = position
    if case.function == "softmax_jacobian":
        return
    if position != ndim - 1 or random.random() < 0.2:
        case.kwargs["axis"] = random.choice((position, position - ndim, np.int64(position)))
    if random.random() < 0.006:
        case.kwargs["axis"] = random.choice((ndim, -ndim - 1, 0.0, None, True, "0", (0,)))
        case.wrong.append("axis")


def _options(case: Case) -> None:
    random, options = case.random, case.kwargs
    stats = case.function == "cross_entropy_stats"
    chance = random.choice((0.0, 0.1, 0.3, 0.6))

    def maybe(name: str, choices: tuple[Any, ...], wrong: tuple[Any, ...]) -> None:
        if random.random() < chance:
            options[name] = random.choice(choices)
        if random.random() < 0.004:
            options[name] = random.choice(wrong)
            case.wrong.append(name)

    maybe(
        "ignore_index",
        (-100, -1, 0, 1, 3, 7, np.int64(2), np.array(1), 2**31, -(2**63)),
        (1.5, "0", None, True, np.ones(2, int)),
    )
    if random.random() < 0.003:
        options["ignore_index"] = random.choice((2**63, -(2**63) - 1, 10**30))
        case.unsure = True
    maybe(
        "logit_scale", (1.0, 0.5, 2, 1 / 3, 1e-3, 1e-6, 100.0, np.float32(0.7)), (0, *WRONG_NUMBERS)
    )
    wrong_caps = tuple(x for x in WRONG_NUMBERS if x is not None)
    if random.random() < 0.5:
        maybe("softcap", (None, 1.0, 30.0, 0.1, 1e3, np.array(5.0)), (0, *wrong_caps))
    _row_numbers(case, "sample_weight", case.rows_shape, chance)
    if stats:
        return
    _row_numbers(case, "weight", (case.n_classes,), chance)
    maybe("label_smoothing", (0.0, 0.1, 0.5, 1.0, 1, 1e-9, np.float32(0.3)), (1.1, *WRONG_NUMBERS))
    maybe("z_loss", (0.0, 1e-4, 0.1, 10), WRONG_NUMBERS)
    maybe("reduction", ("mean", "sum", "none"), ("avg", None, 3, ["mean"], np.array(["mean", "a"])))
    wrong_divisors = tuple(x for x in WRONG_NUMBERS if x is not None and not isinstance(x, float))
    if random.random() < 0.4:
        maybe("divisor", (None, 1.0, 7, 1e6, -3.0, 0.0, 1e-3), (float("nan"), *wrong_divisors))
    reduction = options.get("reduction", "mean")
    if options.get("divisor") is not None and isinstance(reduction, str) and reduction != "mean":
        case.wrong.append("divisor")
    if random.random() < 0.01:  # extreme numbers: no crash; values are held to account elsewhere
        name = random.choice(("logit_scale", "z_loss", "divisor", "softcap"))
        case.wrong = [other for other in case.wrong if other != name]
        options[name] = random.choice((1e-300, 1e300, 1e-40, 1e38, 5e-324, 10**400))
        case.unsure = True


def _row_numbers(case: Case, name: str, shape: tuple[int, ...], chance: float) -> None:
    random = case.random
    if random.random() < chance:
        if name == "sample_weight" and random.random() < 0.3:
            shape = tuple(n if random.random() < 0.6 else 1 for n in shape)
            shape = shape[random.randint(0, len(shape)) :]
        numbers = case.numbers.standard_normal(shape)
        kind = random.random()
        if kind < 0.5:
            numbers = np.abs(numbers)
        if kind > 0.7:
            numbers = np.round(numbers)  # zeros among them
        if kind > 0.97:
            numbers = numbers * random.choice((1e-40, 1e-30, 1e30, 1e37, 1e60))
            case.unsure = True
        dtype = random.choice((*FLOATS.values(), np.dtype(np.int32), np.dtype(np.float64)))
        case.kwargs[name] = laid_out(random, converted(numbers, dtype))
    if random.random() < 0.006:
        bad = np.ones(shape)
        if bad.size and random.random() < 0.5:
            bad.flat[0] = random.choice((np.nan, np.inf, -np.inf))
        elif random.random() < 0.5:
            bad = np.ones((*shape, 2, 3))
        else:
            bad = bad.astype(random.choice(NONSENSE[:2] + NONSENSE[3:7]))
        case.kwargs[name] = bad
        case.wrong.append(name)


def _target(case: Case) -> None:
    random = case.random
    stats = case.function == "cross_entropy_stats"
    if stats and random.random() < 0.2:
        case.args.append(None)
        case.wrong = [name for name in case.wrong if name != "ignore_index"]  # not looked at
        return
    kind = random.random()
    if kind < 0.012:
        bad = (
            None if not stats else "",
            "a",
            np.array("x"),
            np.ones(case.rows_shape, bool),
            [[1], [1, 2]],
            {},
            1j,
        )
        case.args.append(random.choice(bad))
        case.wrong.append("target")
    elif stats or kind < 0.6 or (case.n_classes == 0 and kind < 0.8):
        _index_target(case)
    elif kind < 0.82:
        _distribution(case)
    else:
        _sparse(case)


def _ignored(case: Case) -> int | None:
    """`ignore_index` where an int64 target can hold it."""
    value = case.kwargs.get("ignore_index", -100)
    if isinstance(value, int | np.integer) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return int(value) if -(2**63) <= int(value) < 2**63 else None
    return None


def _spoil(case: Case, ids: Any) -> Any:
    """Put `ignore_index` here and there, and now and then a class that does not exist."""
    random, ignored = case.random, _ignored(case)
    if ignored is not None and ids.size and random.random() < 0.4:
        ids[case.numbers.random(ids.shape) < random.choice((0.1, 0.5, 1.0))] = ignored
    if ids.size and random.random() < 0.03:
        bad = random.choice((case.n_classes, -1, -101, case.n_classes + 1000, 2**62, -(2**62)))
        if bad != ignored:
            ids.flat[random.randrange(ids.size)] = bad
            case.wrong.append("target range")
    dtype = random.choice(INTEGERS) if random.random() < 0.4 else np.dtype(np.int64)
    limits = np.iinfo(dtype)
    if ids.size == 0 or (ids.min() >= limits.min and ids.max() <= limits.max):
        return ids.astype(dtype)
    return ids


def _index_target(case: Case) -> None:
    random = case.random
    shape = case.rows_shape
    if random.random() < 0.01:
        shape = random.choice(((*shape, 1), (7, *shape)))
        case.wrong.append("target shape")
    ids = case.numbers.integers(0, max(case.n_classes, 1), shape)
    if case.n_classes == 0:
        case.args.append(ids)
        return
    given = laid_out(random, _spoil(case, np.asarray(ids)))
    if "target range" in case.wrong:  # a broadcast may have lost it
        there, ignored = np.asarray(given), _ignored(case)
        bad = (there < 0) | (there >= case.n_classes)
        if ignored is not None:
            bad &= there != ignored
        if not bad.any():
            case.wrong.remove("target range")
    case.args.append(given)


def _distribution(case: Case) -> None:
    random = case.random
    kind = random.random()
    a = case.numbers.random(case.shape)
    if kind < 0.25:  # one-hot
        a = (a == a.max(axis=case.axis, keepdims=True)) * 1.0 if a.size else a
    elif kind < 0.6 and a.size:
        a = a / a.sum(axis=case.axis, keepdims=True)
    elif kind < 0.7:
        a = case.numbers.standard_normal(case.shape)
    elif kind < 0.75:
        a = a * 0
    if a.size and random.random() < 0.03:
        a.flat[random.randrange(a.size)] = random.choice((np.nan, np.inf, -np.inf, 1e-40, 1e38))
    dtype = random.choice(tuple(FLOATS.values()))
    if random.random() < 0.02:
        a = a[..., None] if random.random() < 0.5 else np.ones(case.rows_shape)
        case.wrong.append("target shape")
        dtype = FLOATS["float64"]
    case.args.append(laid_out(random, converted(a, dtype)))


def _sparse(case: Case) -> None:
    random = case.random
    k = random.choice((1, 1, 2, 3, 4, 0))
    axis = case.axis % len(case.shape)
    shape = (*case.rows_shape[:axis], k, *case.rows_shape[axis:])
    ids = case.numbers.integers(0, max(case.n_classes, 1), shape)
    if case.n_classes:
        ids = _spoil(case, ids)
    prob = case.numbers.random(shape)
    if random.random() < 0.2:
        prob = case.numbers.standard_normal(shape)
    if prob.size and random.random() < 0.02:
        prob.flat[random.randrange(prob.size)] = random.choice((np.nan, np.inf))
    dtype = random.choice((*FLOATS.values(), np.dtype(np.int64)))
    prob = converted(prob, dtype)
    if random.random() < 0.02:
        prob = random.choice((prob[..., None], prob.astype(complex), "a", prob.astype(bool)))
        case.wrong.append("target_prob")
    case.args.append(_kept_order(case, ids))
    case.kwargs["target_prob"] = laid_out(random, prob) if isinstance(prob, np.ndarray) else prob


def _kept_order(case: Case, ids: Any) -> Any:
    """A layout that neither loses a bad id nor an empty shape."""
    layout = case.random.choice(("plain", "plain", "fortran", "strided", "readonly", "swapped"))
    return laid_out(case.random, ids, layout)


def _vector(case: Case) -> None:
    random = case.random
    x = case.numbers.standard_normal(case.shape)
    if random.random() < 0.02:
        x = x[..., None]
        case.wrong.append("vector")
    dtype = random.choice((*FLOATS.values(), np.dtype(np.int16)))
    case.args.append(laid_out(random, converted(x, dtype)))


def _grad_output(case: Case) -> None:
    random = case.random
    kind = random.random()
    if kind < 0.6:
        return
    reduction = case.kwargs.get("reduction", "mean")
    if kind < 0.75:
        u: Any = random.choice((1.0, 0.0, -2.5, 1e-3, 3, np.float32(0.1), float("nan"), 65504.0))
    elif kind < 0.985:
        if not isinstance(reduction, str) or reduction != "none":
            return
        dtype = random.choice((*FLOATS.values(), np.dtype(np.int16)))
        u = laid_out(random, converted(case.numbers.standard_normal(case.rows_shape), dtype))
    else:
        u = random.choice(("a", 1j, np.ones((*case.rows_shape, 9)), np.array(True)))
        case.wrong.append("grad_output")
    case.kwargs["grad_output"] = u


def _out(case: Case) -> None:
    random, given = case.random, case.args[0]
    if case.dtype is None or case.wrong:
        return
    kind = random.random()
    plain = isinstance(given, np.ndarray) and given.dtype == case.dtype and given.flags.aligned
    fresh = np.full(case.shape, 7, case.dtype)
    if kind < 0.3:
        case.kwargs["out"] = fresh
    elif kind < 0.5 and plain:
        case.kwargs["out"] = given  # in place, if it may be written to
        repeats = any(s == 0 and n > 1 for s, n in zip(given.strides, given.shape, strict=True))
        if not given.flags.writeable or (repeats and given.size):
            case.wrong.append("out")
        else:
            case.unsure = True  # strides that no (outer, V, inner) view has, other inputs in it
    elif kind < 0.75:
        layout = random.choice(("fortran", "strided", "negative"))
        case.kwargs["out"] = laid_out(random, fresh, layout)
        case.unsure = True  # as above
    elif kind < 0.85 and plain and given.size > 1 and given.flags.c_contiguous:
        case.kwargs["out"] = given.reshape(-1)[::-1].reshape(case.shape)
        case.unsure = given.size == 0
        case.wrong.append("out")
    else:
        wrong_dtype = np.float64 if case.dtype == np.float32 else np.float32
        read_only = fresh.copy()
        read_only.setflags(write=False)
        unaligned = laid_out(random, fresh, "unaligned")
        bad: list[Any] = [
            [1.0], 3, fresh[..., None], np.zeros(case.shape, wrong_dtype),
            read_only if fresh.size else 3,
            fresh.astype(case.dtype.newbyteorder()) if case.dtype.name != "bfloat16" else "out",
        ]  # fmt: skip
        if fresh.size > 1:
            bad.append(np.broadcast_to(fresh.reshape(-1)[0], case.shape))
        if not unaligned.flags.aligned and fresh.size:
            bad.append(unaligned)
        case.kwargs["out"] = random.choice(bad)
        case.wrong.append("out")

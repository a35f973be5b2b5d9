"""What is measured: shapes named after their uses, with their tasks and dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from crossent.cli.bench.peers import TASKS, Task
from crossent.cli.errors import InputError

DTYPES = ("float64", "float32", "float16", "bfloat16")
MAIN: Task = "loss+gradient"
SCALE = 3.0  # standard deviation of the logits


@dataclass(frozen=True)
class Shape:
    """Logits of one use.

    Parameters
    ----------
    name, use : str
    logits : tuple of int
    axis : int
        The class axis.
    tasks : tuple of Task
        What is measured if nothing else is asked for.
    dtypes : tuple of str
        Of the logits; all but float32 for the main task only, unless `every`.
    every : bool
        Measure every task in every dtype.
    default : bool
        Measure it where no shape is asked for.
    """

    name: str
    use: str
    logits: tuple[int, ...]
    axis: int = -1
    tasks: tuple[Task, ...] = (MAIN,)
    dtypes: tuple[str, ...] = ("float32",)
    every: bool = False
    default: bool = True

    @property
    def text(self) -> str:
        """Return the sizes as in tables, 8192×1000."""
        return "×".join(map(str, self.logits))

    def nbytes(self, dtype: str) -> int:
        """Return how many bytes the logits take."""
        return math.prod(self.logits) * {"float64": 8, "float32": 4}.get(dtype, 2)

    def measured(self) -> dict[str, tuple[Task, ...]]:
        """Return the tasks to measure in each dtype."""
        return {
            dtype: self.tasks if dtype == "float32" or self.every else (MAIN,)
            for dtype in self.dtypes
        }

    def small(self) -> Shape:
        """Return the same use with few rows."""
        most = 64 if self.logits[self.axis] < 2000 else 4
        axis = self.axis % len(self.logits)
        sizes = [n if k == axis else min(n, most) for k, n in enumerate(self.logits)]
        return replace(self, logits=tuple(sizes))


_BOTH = ("float32", "bfloat16")
SHAPES = (
    Shape("tiny", "a tiny call", (32, 10), tasks=(MAIN, "loss")),
    Shape("digits", "10 digits", (65536, 10)),
    Shape("cifar100", "100 classes of CIFAR", (65536, 100)),
    Shape("imagenet", "1000 classes of ImageNet", (8192, 1000), tasks=TASKS),
    Shape("segmentation", "21-class segmentation maps", (8, 21, 512, 512), axis=1),
    Shape("vocab-32k", "a 32k vocabulary", (2048, 32768), tasks=TASKS, dtypes=_BOTH),
    Shape("vocab-128k", "a 128k vocabulary", (1024, 131072), tasks=(MAIN, "loss"), dtypes=_BOTH),
    Shape("vocab-256k", "a 256k vocabulary", (512, 262144), tasks=(MAIN, "loss"), dtypes=_BOTH),
)


def chosen(
    shapes: str | None,
    dtypes: str | None,
    tasks: str | None,
    quick: bool,
    known: Sequence[Shape] = SHAPES,
    all_tasks: tuple[Task, ...] = TASKS,
) -> tuple[Shape, ...]:
    """Return the shapes a command line asks for, each with the dtypes and tasks it asks for.

    Parameters
    ----------
    shapes, dtypes, tasks : str, optional
        Names separated by commas.
    quick : bool
        Take few rows of each.
    known : sequence of Shape
        All there are.
    all_tasks : tuple of Task
        The same.

    Raises
    ------
    InputError
        For a name that does not exist.
    """
    by_name = {shape.name: shape for shape in known}
    found = [by_name[name] for name in names("--shapes", shapes, tuple(by_name))]
    if shapes is None:
        found = [shape for shape in found if shape.default]
    if dtypes is not None:
        found = [replace(shape, dtypes=names("--dtypes", dtypes, DTYPES)) for shape in found]
    if tasks is not None:
        asked = names("--tasks", tasks, all_tasks)
        wanted: tuple[Task, ...] = tuple(task for task in TASKS if task in asked)
        found = [replace(shape, tasks=wanted, every=True) for shape in found]
    return tuple(shape.small() if quick else shape for shape in found)


def names(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names in a list separated by commas, all that are known for None.

    Examples
    --------
    >>> names("--dtypes", "float32, bfloat16", DTYPES)
    ('float32', 'bfloat16')
    """
    if text is None:
        return known
    given = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in given:
        if name not in known:
            raise InputError(f"{option} names {name!r}; there are {', '.join(known)}")
    return given

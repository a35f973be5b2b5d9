"""The commands of `crossent bench` and their options."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from crossent.cli.bench.benchmark import Benchmark

app = typer.Typer(
    help="Time this library and its peers in one run, on the same inputs.",
    rich_markup_mode=None,
)


_Threads = Annotated[
    int | None, typer.Option(help="Of every contender (all usable CPUs if not given).")
]
_Seconds = Annotated[float, typer.Option(min=0.001, help="Time for each contender and shape.")]
_Repeats = Annotated[
    int | None, typer.Option(min=1, help="Rounds for each shape, in place of --seconds.")
]
_Shapes = Annotated[str | None, typer.Option(help="Names, separated by commas (all if not given).")]
_Dtypes = Annotated[
    str | None,
    typer.Option(help="float64, float32, float16, bfloat16 (if not given, as suits a shape)."),
]
_Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="New folder (if not given crossent-bench-BENCHMARK, numbered where that exists).",
    ),
]
_Force = Annotated[bool, typer.Option("--force", help="Replace an older output folder.")]
_Quick = Annotated[
    bool, typer.Option("--quick", help="Few rows and rounds, to see that all works.")
]


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Time this library and its peers in one run, on the same inputs."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def rows(
    threads: _Threads = None,
    seconds: _Seconds = 0.5,
    repeats: _Repeats = None,
    shapes: _Shapes = None,
    dtypes: _Dtypes = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="loss+gradient, loss, softmax, log_softmax, stats (if not given, as suits a "
            "shape)."
        ),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="torch, torch-compile, jax, sklearn, numpy, scipy (all installed ones if not "
            "given)."
        ),
    ] = None,
    output: _Output = None,
    force: _Force = False,
    quick: _Quick = False,
) -> None:
    """Loss and gradient of rows of logits, against peers and plain copies; writes a new folder."""
    from crossent.cli.bench.bench_rows import ROWS

    _run(ROWS, threads, repeats, seconds, shapes, dtypes, tasks, peers, output, force, quick)


@app.command()
def torch_rows(
    threads: _Threads = None,
    seconds: _Seconds = 0.5,
    repeats: _Repeats = None,
    shapes: _Shapes = None,
    dtypes: _Dtypes = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="torch, torch-compile, crossent-compile (all if not given); crossent is always in."
        ),
    ] = None,
    output: _Output = None,
    force: _Force = False,
    quick: _Quick = False,
) -> None:
    """Loss and backward pass from PyTorch, against its own loss; writes a new folder."""
    from crossent.cli.bench.bench_torch_rows import TORCH_ROWS

    _run(TORCH_ROWS, threads, repeats, seconds, shapes, dtypes, None, peers, output, force, quick)


@app.command()
def head(
    threads: _Threads = None,
    seconds: _Seconds = 0.5,
    repeats: _Repeats = None,
    shapes: _Shapes = None,
    dtypes: _Dtypes = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="loss+gradient, loss (if not given, as suits a shape)."),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="crossent-torch, torch, torch-compile, torch-linear, torch-chunked, jax (all "
            "installed ones if not given); crossent from NumPy is always in."
        ),
    ] = None,
    output: _Output = None,
    force: _Force = False,
    quick: _Quick = False,
    memory: Annotated[
        bool, typer.Option(help="Measure the memory of each contender, in processes of their own.")
    ] = True,
) -> None:
    """Last layer, loss and gradients in one, against peers and products; writes a new folder."""
    from crossent.cli.bench.bench_head import HEAD

    given = (threads, repeats, seconds, shapes, dtypes, tasks, peers, output, force, quick, memory)
    _run(HEAD, *given)


@app.command()
def fit(
    threads: _Threads = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for each solver's fits, once its tolerance is known.")
    ] = 10.0,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Number of those fits, in place of --seconds.")
    ] = None,
    limit: Annotated[float, typer.Option(min=0.001, help="Seconds that a fit may take.")] = 120.0,
    memory: Annotated[
        float, typer.Option(min=0.001, help="GB that a fit may take beside its data.")
    ] = 4.0,
    tasks: Annotated[
        str | None,
        typer.Option(help="digits, fashion-mnist, text, many-classes (all if not given)."),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(
            help="crossent-lbfgs, sklearn-lbfgs, sklearn-newton-cg, sklearn-newton-cholesky (all "
            "if not given); crossent's newton-cg is always in."
        ),
    ] = None,
    output: _Output = None,
    force: _Force = False,
    quick: _Quick = False,
) -> None:
    """Time to scikit-learn's own objective, against its solvers; writes a new folder."""
    from rich.console import Console

    from crossent.cli.bench.bench_fit import FitSettings, run

    given = (threads, seconds, repeats, limit, memory, tasks, peers, output, force, quick)
    run(FitSettings(*given), Console(highlight=False, markup=False, soft_wrap=True))


def _run(benchmark: "Benchmark[Any]", *given: Any) -> None:
    from rich.console import Console

    from crossent.cli.bench.run import Settings, run

    run(benchmark, Settings(*given), Console(highlight=False, markup=False, soft_wrap=True))

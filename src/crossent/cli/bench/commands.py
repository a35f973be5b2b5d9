"""The commands of `crossent bench` and their options."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Time this library and its peers in one run, on the same inputs.",
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Time this library and its peers in one run, on the same inputs."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def rows(
    threads: Annotated[
        int | None, typer.Option(help="Of every contender (all usable CPUs if not given).")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.001, help="Time for each contender and shape.")
    ] = 0.5,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds for each shape, in place of --seconds.")
    ] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Names, separated by commas (all if not given).")
    ] = None,
    dtypes: Annotated[
        str | None,
        typer.Option(help="float64, float32, float16, bfloat16 (if not given, as suits a shape)."),
    ] = None,
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
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="New folder (if not given crossent-bench-rows, numbered where that exists).",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older output folder.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few rows and rounds, to see that all works.")
    ] = False,
) -> None:
    """Loss and gradient of rows of logits, against peers and plain copies; writes a new folder."""
    from rich.console import Console

    from crossent.cli.bench.bench_rows import RowsSettings, bench_rows

    settings = RowsSettings(
        threads=threads,
        repeats=repeats,
        seconds=seconds,
        shapes=shapes,
        dtypes=dtypes,
        tasks=tasks,
        peers=peers,
        output=output,
        force=force,
        quick=quick,
    )
    bench_rows(settings, Console(highlight=False, markup=False, soft_wrap=True))

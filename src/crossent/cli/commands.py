"""The commands of `crossent` and their options. Modules load inside the commands that use them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crossent.cli.bench.commands import app as bench
from crossent.cli.errors import InputError

app = typer.Typer(
    help="A softmax layer on your data: train, predict, explain, check, bench.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bench, name="bench")


class Scale(StrEnum):
    """Feature scaling by name."""

    standard = "standard"
    minmax = "minmax"
    pixel = "pixel"
    none = "none"


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"crossent {version('crossent')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def crossent(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Train a softmax layer on your data, apply it, and see how its gradient comes about."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    data: Annotated[
        str,
        typer.Argument(
            help="digits, fashion-mnist, a .csv, .parquet or .npz file, or a folder "
            "with the four files of an MNIST-like data set."
        ),
    ] = "digits",
    target: Annotated[
        str | None,
        typer.Option(help="Column of classes; for .npz the array, y if not given."),
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Column that is no feature; may be repeated.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with the four files of fashion-mnist.")
    ] = None,
    test_size: Annotated[
        float | None,
        typer.Option(
            help="Share of rows to test on, drawn from each class in proportion "
            "(0.2 if not given; fashion-mnist has its own test rows)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the split.")] = 0,
    scale: Annotated[
        Scale | None,
        typer.Option(
            help="Feature scaling, fitted on training rows: mean 0 and variance 1, range "
            "0 to 1, division by the white level, or none (pixel for images of bytes, standard "
            "for anything else)."
        ),
    ] = None,
    c: Annotated[
        float | None,
        typer.Option(
            "--C",
            help="Inverse strength of the L2 penalty, inf for none (1 if not given; fashion-mnist "
            "0.01).",
        ),
    ] = None,
    select_penalty: Annotated[
        bool,
        typer.Option(
            "--select-penalty",
            help="Choose C by cross-validation on the training rows: the one with the lowest "
            "held-out loss.",
        ),
    ] = False,
    cs: Annotated[
        str | None,
        typer.Option(
            "--Cs",
            help="Cs to choose from, separated by commas (if not given 1e-4, 3e-4, … to 1e4, "
            "ended early where the loss only rises).",
        ),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Parts to hold out in turn (5 if not given).")
    ] = None,
    one_se: Annotated[
        bool,
        typer.Option(
            "--one-se",
            help="Choose the strongest penalty within one standard error of the best.",
        ),
    ] = False,
    max_iter: Annotated[int, typer.Option(min=1, help="Most iterations.")] = 1000,
    tol: Annotated[
        float | None,
        typer.Option(
            help="Converged when no entry of the gradient is larger (1e-6 if not given; images of "
            "bytes 1e-5)."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="New folder (if not given crossent-DATA, numbered where that exists).",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older output folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing.")] = False,
) -> None:
    """Fit a softmax layer; write the model, its metrics and a report to a new folder.

    Ctrl-C ends the fit, writes the best model so far and exits with status 3; a second Ctrl-C, or
    one before there is a model, ends it with nothing written.
    """
    from rich.console import Console

    from crossent.cli.penalty_path import parse_cs
    from crossent.cli.train import TrainSettings
    from crossent.cli.train import train as run

    settings = TrainSettings(
        source=data,
        target=target,
        data_dir=data_dir,
        drop=tuple(drop or ()),
        test_size=test_size,
        seed=seed,
        scale=scale,
        C=c,
        max_iter=max_iter,
        tol=tol,
        select_penalty=select_penalty,
        Cs=None if cs is None else parse_cs(cs),
        folds=folds,
        one_se=one_se,
        output=output,
        force=force,
    )
    trained = run(settings, Console(quiet=quiet, highlight=False, markup=False, soft_wrap=True))
    if trained.interrupted:
        raise typer.Exit(3)


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(help="Folder that train made, or its model.safetensors.")
    ],
    file: Annotated[
        Path, typer.Argument(help=".csv or .parquet with the model's columns, or .npz with X.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New .csv or .parquet file (stdout if not given)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an older file.")] = False,
) -> None:
    """Apply a saved model: class and probabilities, one row a line."""
    from crossent.cli.predict import predict as run

    run(model, file, output, force)


@app.command()
def explain(
    logits: Annotated[str, typer.Option(help="Weighted sums, separated by commas.")],
    target: Annotated[int, typer.Option(help="Position of the true class, from 0.")],
) -> None:
    """Work one example through: softmax, loss, Jacobian, chain rule, gradient."""
    from rich.console import Console

    from crossent.cli.explain import explain as run

    try:
        numbers = [float(number) for number in logits.split(",")]
    except ValueError:
        raise InputError(
            f"--logits is {logits!r}; give numbers separated by commas, as in 2,1,0.1"
        ) from None
    try:
        run(numbers, target, console=Console(highlight=False))
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(str(error)) from error


@app.command()
def check(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and options.")] = False,
) -> None:
    """Compare the installed kernels with the reference on this machine; exit 1 on a mismatch."""
    from rich.console import Console

    from crossent.cli.check import check as run

    if not run(console=Console(highlight=False), quick=quick):
        raise typer.Exit(1)

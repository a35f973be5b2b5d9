"""The console command `crossent`: runs a command and turns errors into one line and exit 2."""

import sys
from typing import Any

EXTRA_MODULES = {
    "matplotlib",
    "mpmath",
    "polars",
    "rich",
    "safetensors",
    "scipy",
    "sklearn",
    "typer",
}


def main() -> None:
    """Run the command line and exit.

    Exit status: 0 done; 1 `crossent check` found a mismatch; 2 the input cannot be used;
    3 `crossent train` was interrupted and has written the best model so far; 130 interrupted, and
    nothing was written.
    """
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(_fail("interrupted", 130))
    except BrokenPipeError:
        # The reader has gone (`crossent predict … | head`), and Python would flush again at exit.
        sys.stdout = None
        sys.exit(1)
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRA_MODULES:
            raise
        sys.exit(_fail(f"the command line needs {module}; pip install 'crossent[cli]'", 2))


def _run() -> int:
    import typer

    from crossent.cli.commands import app
    from crossent.cli.errors import InputError

    usage_error: Any = typer.BadParameter.__base__  # typer does not export it by name
    try:
        code = app(standalone_mode=False)
    except typer.Abort:  # what older releases of typer make of KeyboardInterrupt
        raise KeyboardInterrupt from None
    except usage_error as error:
        return _fail(
            f"{error.format_message().rstrip('.')} (crossent --help lists commands and options)", 2
        )
    except InputError as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        raise
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        return _fail(f"{what}{error.strerror or error}", 2)
    except MemoryError:
        return _fail("not enough memory; use fewer rows or columns", 2)
    if code == 130:  # what typer makes of KeyboardInterrupt
        raise KeyboardInterrupt
    return int(code or 0)


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    printable = "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )
    print(f"crossent: {printable}", file=sys.stderr)
    return code

"""New folders and files that appear whole or not at all, and replace nothing unless told to."""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from crossent.cli.errors import InputError, first_line


def require_new_folder(folder: Path, force: bool, ours: frozenset[str]) -> None:
    """Raise an `InputError` unless `folder` can be made, or with `force` replaced.

    Parameters
    ----------
    folder : Path
    force : bool
        Whether a folder that holds nothing but `ours` may be replaced.
    ours : frozenset of str
        File names that a folder of ours can hold.
    """
    _require_writable_parent(folder)
    if not os.path.lexists(folder):
        return
    if not force:
        raise InputError(
            f"{folder} exists already; choose another --output, or replace it with --force"
        )
    if folder.is_symlink() or not folder.is_dir():
        raise InputError(f"{folder} exists and is not a folder; choose another --output")
    others = sorted(set(os.listdir(folder)) - ours)
    if others:
        raise InputError(
            f"{folder} holds other things too ({others[0]}), so --force does not replace it; "
            "move them or choose another --output"
        )


def unused(folder: Path) -> Path:
    """Return `folder`, or the first of ``folder-2``, ``folder-3``, … where it exists already."""
    tried, number = folder, 1
    while os.path.lexists(tried):
        number += 1
        tried = folder.with_name(f"{folder.name}-{number}")
    return tried


@contextlib.contextmanager
def new_folder(folder: Path, force: bool, ours: frozenset[str]) -> Iterator[Path]:
    """Yield a hidden sibling of `folder` to fill, and give it that name if the block succeeds."""
    require_new_folder(folder, force, ours)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder, error) from None
    try:
        staging.chmod(0o777 & ~_umask())
        filled = staging / folder.name
        filled.mkdir()
        yield filled
        with _uninterrupted():
            require_new_folder(folder, force, ours)
            if folder.exists():
                replaced = staging / "replaced"
                folder.rename(replaced)
                try:
                    filled.rename(folder)
                except BaseException:
                    replaced.rename(folder)
                    raise
            else:
                filled.rename(folder)
    except OSError as error:
        raise _unwritable(folder, error) from None
    finally:
        with _uninterrupted():
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C while folders change places: between two renames the older one is a stray."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is interrupted, and only it may set a handler
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def new_file(path: Path, force: bool) -> Iterator[Path]:
    """Yield a hidden sibling of `path` to write, and give it that name if the block succeeds."""
    _require_writable_parent(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file in it")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} exists already; choose another name, or replace it with --force")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    os.close(handle)
    staging = Path(name)
    try:
        staging.chmod(0o666 & ~_umask())
        yield staging
        staging.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        staging.unlink(missing_ok=True)


def _require_writable_parent(path: Path) -> None:
    parent = path.parent
    if not parent.is_dir():
        raise InputError(
            f"{parent} is no folder, so {path.name} cannot be made there; make it first"
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"the folder {parent} is not writable; choose another --output")


def _unwritable(path: Path, error: OSError) -> InputError:
    reason = error.strerror or first_line(error)
    return InputError(f"{path} cannot be written: {reason}; choose another --output")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

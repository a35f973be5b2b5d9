"""The pool of threads as threadpoolctl sees it; importing this registers it there, once."""

from __future__ import annotations

import sys
from typing import Any

import threadpoolctl

from crossent import _native

if tuple(map(int, threadpoolctl.__version__.split(".")[:2])) < (3, 5):
    raise ImportError(
        f"crossent needs threadpoolctl 3.5 or newer, got {threadpoolctl.__version__}; "
        "pip install --upgrade threadpoolctl"
    )


class CrossentController(threadpoolctl.LibController):  # type: ignore[misc]  # untyped base
    """Reads and sets the one pool of this process, by the native module's C symbols."""

    user_api = "crossent"
    internal_api = "crossent"
    # Other packages call their modules so as well. threadpoolctl looks for the symbols once it has
    # made a controller: until then nothing may rely on them.
    filename_prefixes = ("_native.",)
    check_symbols = ("crossent_get_num_threads", "crossent_set_num_threads")

    def get_num_threads(self) -> int:
        """Return the number of threads the kernels use at most."""
        return int(self.dynlib.crossent_get_num_threads())

    def set_num_threads(self, num_threads: int) -> None:
        """Let the kernels use at most `num_threads` threads, in the whole process."""
        self.dynlib.crossent_set_num_threads(num_threads)

    def get_version(self) -> Any:
        """Return crossent's version (None while crossent is still being imported)."""
        return getattr(sys.modules["crossent"], "__version__", None)

    def set_additional_attributes(self) -> None:
        """Add what threadpoolctl also says of BLAS libraries."""
        self.threading_layer = "pthreads"
        self.architecture = _native.isa()


threadpoolctl.register(CrossentController)

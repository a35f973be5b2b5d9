"""What tests share: the registry's dtypes and instruction sets, and skips that count as failures.

Tests of a peer use `pytest.importorskip`, so they are skipped where it is absent. ``make test``
installs its peers and names them in ``CROSSENT_TEST_REQUIRE``: none of these may be skipped there.
"""

import os
import re

import numpy as np
import pytest

from crossent import _native
from crossent.backends import BACKENDS

REQUIRED = set(os.environ.get("CROSSENT_TEST_REQUIRE", "").replace(",", " ").split())


def _fail_if_required(report):
    if report.skipped and isinstance(report.longrepr, tuple):
        absent = re.search(r"could not import '(\w+)", report.longrepr[2])
        if absent and absent[1] in REQUIRED:
            report.outcome = "failed"
            report.longrepr = (
                f"{report.nodeid} was skipped, but CROSSENT_TEST_REQUIRE names {absent[1]}: "
                f"{report.longrepr[2]}"
            )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _fail_if_required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _fail_if_required((yield))


@pytest.fixture(params=[backend.dtype for backend in BACKENDS if backend.device == "cpu"])
def dtype(request):
    """Each dtype that a backend of the registry serves from NumPy arrays."""
    if request.param == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(request.param)


@pytest.fixture(params=_native.available_isas())
def isa(request):
    """Each instruction set this machine can run, in use for the test."""
    before = _native.isa()
    assert _native.set_isa(request.param)
    yield request.param
    assert _native.set_isa(before)

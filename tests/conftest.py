"""What tests share: the registry's dtypes and instruction sets, and skips that count as failures.

Tests of a peer use `pytest.importorskip`, so they are skipped where it is absent. ``make test``
installs its peers and names them in ``CROSSENT_TEST_REQUIRE``: none of these may be skipped there.
"""

import gzip
import importlib.util
import os
import re
import struct
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import crossent
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


@pytest.fixture
def one_torch_thread():
    """On a busy machine PyTorch's threads wait 1000 times longer for each other than they work."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def example():
    """Load examples/NAME.py as a module: `with example(NAME) as module`."""
    folder = Path(__file__).parents[1] / "examples"

    @contextmanager
    def load(name):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look their module up
        try:
            spec.loader.exec_module(module)
            yield module
        finally:
            sys.modules.pop(spec.name, None)

    return load


@pytest.fixture(scope="session")
def idx_folder(tmp_path_factory):
    """Four IDX files of noise in which the brightest rows of pixels tell the class."""
    folder = tmp_path_factory.mktemp("fashion")
    rng = np.random.default_rng(4)
    for stem, rows in (("train", 520), ("t10k", 100)):
        labels = (rng.permutation(rows) % 10).astype(np.uint8)
        images = rng.integers(0, 100, (rows, 28, 28), dtype=np.uint8)
        images[np.arange(28) // 2 == labels[:, None] + 2] += 150
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
            path = folder / f"{stem}-{name}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes()))
    return folder


@pytest.fixture(params=["numpy", "torch"])
def front(request):
    """Each front end: the same functions from NumPy arrays to NumPy arrays."""
    if request.param == "numpy":
        return crossent
    request.getfixturevalue("one_torch_thread")
    return TorchFront()


class TorchFront:
    """The functions of `crossent`, served by `crossent.torch`."""

    def __init__(self):
        import torch

        self.torch = torch

    def cross_entropy(self, input, target, **options):
        return self._loss(self._tensor(input), target, options).numpy()

    def cross_entropy_value_and_grad(self, input, target, *, grad_output=None, **options):
        logits = self._tensor(input).requires_grad_()
        loss = self._loss(logits, target, options)
        loss.backward(self._upstream(loss, grad_output))
        return crossent.LossGrad(loss.detach().numpy(), self._array(logits.grad, input.dtype))

    def cross_entropy_hvp(self, input, target, vector, *, grad_output=None, **options):
        logits = self._tensor(input).requires_grad_()
        loss = self._loss(logits, target, options)
        upstream = self._upstream(loss, grad_output)
        (grad,) = self.torch.autograd.grad(loss, logits, upstream, create_graph=True)
        (product,) = self.torch.autograd.grad(grad, logits, self._tensor(vector))
        return self._array(product, input.dtype)

    def _loss(self, logits, target, options):
        from crossent.torch import cross_entropy

        options = {"axis": -1} | options
        if isinstance(options.get("sample_weight"), float):
            options["sample_weight"] = np.array(options["sample_weight"])
        options = {name: self._tensor(value) for name, value in options.items()}
        return cross_entropy(logits, self._tensor(target), dim=options.pop("axis"), **options)

    def _upstream(self, loss, grad_output):
        given = 1.0 if grad_output is None else grad_output
        return self.torch.as_tensor(given, dtype=loss.dtype).expand(loss.shape)

    def _tensor(self, value):
        """Return a tensor on the array's memory; anything else as it is."""
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.name == "bfloat16":
            return self.torch.from_numpy(value.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(value)

    def _array(self, tensor, dtype):
        if dtype.name == "bfloat16":
            return tensor.view(self.torch.int16).numpy().view(dtype)
        return tensor.numpy()

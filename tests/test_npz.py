"""NPZ files: arrays come back as saved; nothing is unpickled; declared sizes are not trusted."""

import io
import zipfile

import numpy as np
import pytest

from crossent.cli import npz
from crossent.cli.errors import InputError
from crossent.cli.npz import read_arrays


def header(shape, descr="<f8"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": descr, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def archive(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_come_back(tmp_path, save):
    arrays = {
        "X": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "y": np.array(["a", "é"]),
        "big": np.arange(3, dtype=">i4"),
        "none": np.zeros((0, 3), np.float32),
    }
    save(tmp_path / "a.npz", **arrays)
    for array, read in zip(
        arrays.values(), read_arrays(tmp_path / "a.npz", list(arrays)), strict=True
    ):
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array)


class Pickled:
    ran = False

    def __reduce__(self):
        return setattr, (Pickled, "ran", True)


def test_nothing_is_unpickled(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, X=np.array([Pickled()], object))
    with pytest.raises(InputError, match=r"has the type object.*nothing is unpickled"):
        read_arrays(path, ["X"])
    assert not Pickled.ran


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (header((10**12, 10**6)) + bytes(80), "declares the shape .* but holds 80"),
        (header((2, 3)) + bytes(40), "which takes 48 bytes, but holds 40"),
        (header((2, 3)) + bytes(56), "which takes 48 bytes, but holds 56"),
        (header((-1, -3)) + bytes(24), "cannot be read as NPZ"),
        (header((2,), "<M8[s]") + bytes(16), "has the type datetime64"),
        (b"\x93NUMPY\x03\x00" + bytes(20), r"version \(3, 0\) of the NPY format"),
        (b"no array", "cannot be read as NPZ"),
        (b"", "cannot be read as NPZ"),
        (b"\x93NUMPY\x01\x00\x0a\x00{'descr': \n", "cannot be read as NPZ"),
    ],
)
def test_members_that_are_not_what_they_say(tmp_path, content, text):
    with pytest.raises(InputError, match=text):
        read_arrays(archive(tmp_path / "a.npz", X=content), ["X"])


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "MAX_UNCHECKED_BYTES", 1 << 20)
    path = archive(tmp_path / "a.npz", X=header((1 << 18,)) + bytes(1 << 21))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)
    with pytest.raises(InputError, match=r"X would unpack to 0\.0 GiB from \d+ bytes; that is ref"):
        read_arrays(path, ["X"])


def test_damage_anywhere_is_an_input_error(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, X=np.arange(60.0).reshape(20, 3))
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(400):
        damaged = bytearray(sound)
        for place in rng.integers(0, len(sound), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged) if trial % 2 else sound[: rng.integers(len(sound))])
        try:
            read_arrays(path, ["X"])
        except InputError:
            refused += 1
    assert refused > 300


def test_absent_file_and_array(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_arrays(tmp_path / "a.npz", ["X"])
    np.savez(tmp_path / "a.npz", x=1)
    with pytest.raises(InputError, match="no array named 'X'; it has x"):
        read_arrays(tmp_path / "a.npz", ["X"])

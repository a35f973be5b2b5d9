"""model.safetensors: what is saved comes back; anything else is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("safetensors")
from safetensors.numpy import save_file

from crossent.cli.errors import InputError
from crossent.cli.model_file import ARRAYS, SavedModel, load, save
from crossent.cli.scaling import Scaling

RNG = np.random.default_rng(0)
MODEL = SavedModel(
    coef=RNG.normal(size=(3, 4)),
    intercept=RNG.normal(size=3),
    scaling=Scaling(RNG.normal(size=4), RNG.uniform(1, 2, size=4)),
    classes=["a", 'b "<&', "é"],
    feature_names=["w", "x, y", "z", "ü"],
    image_shape=(2, 2),
)
TENSORS = {
    "coef": MODEL.coef,
    "intercept": MODEL.intercept,
    "feature_offset": MODEL.scaling.offset,
    "feature_scale": MODEL.scaling.scale,
}
METADATA = {
    "format_version": 1,
    "classes": ["a", "b", "c"],
    "feature_names": ["w", "x", "y", "z"],
    "image_shape": None,
}


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        replace(MODEL, classes=[3, -1, 2**60], image_shape=None),
        replace(MODEL, classes=[False, True], coef=MODEL.coef[:1], intercept=MODEL.intercept[:1]),
    ],
)
def test_round_trip(tmp_path, model):
    save(model, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        read = load(path)
        assert [type(label) for label in read.classes] == [type(label) for label in model.classes]
        for field in ("classes", "feature_names", "image_shape"):
            assert getattr(read, field) == getattr(model, field)
        for field in ("coef", "intercept"):
            np.testing.assert_array_equal(getattr(read, field), getattr(model, field))
        np.testing.assert_array_equal(read.scaling.offset, model.scaling.offset)
        np.testing.assert_array_equal(read.scaling.scale, model.scaling.scale)


def test_the_same_model_gives_the_same_bytes(tmp_path):
    save(MODEL, tmp_path / "a")
    save(MODEL, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_logits_of_three_and_of_two_classes():
    X = RNG.normal(size=(5, 4))
    scaled = (X - MODEL.scaling.offset) / MODEL.scaling.scale
    np.testing.assert_allclose(
        MODEL.logits(X), scaled @ MODEL.coef.T + MODEL.intercept, rtol=1e-13, atol=1e-14
    )
    two = replace(MODEL, classes=["a", "b"], coef=MODEL.coef[:1], intercept=MODEL.intercept[:1])
    assert two.logits(X)[:, 0].tolist() == [0] * 5
    np.testing.assert_array_equal(two.logits(X)[:, 1], MODEL.logits(X)[:, 0])
    np.testing.assert_array_equal(two.class_weights(), [np.zeros(4), MODEL.coef[0]])


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        (without(TENSORS, "coef"), "needs exactly the arrays coef"),
        (TENSORS | {"more": np.zeros(1)}, "needs exactly the arrays coef"),
        (TENSORS | {"coef": np.zeros((3, 5))}, r"coef has the shape \(3, 5\), expected \(3, 4\)"),
        (TENSORS | {"coef": np.zeros((1, 4))}, r"coef has the shape \(1, 4\), expected \(3, 4\)"),
        (TENSORS | {"coef": np.zeros(12)}, "coef has 1 dimensions of F64, expected 2 of F64"),
        (TENSORS | {"coef": np.zeros((3, 4), np.int64)}, "2 dimensions of I64, expected 2 of F64"),
        (TENSORS | {"intercept": np.zeros(2)}, r"intercept has the shape \(2,\)"),
        (TENSORS | {"intercept": np.array([0, np.nan, 0])}, "intercept is not finite"),
        (TENSORS | {"feature_offset": np.full(4, np.inf)}, "feature_offset is not finite"),
        (TENSORS | {"feature_scale": np.zeros(4)}, "feature_scale is not positive"),
        (TENSORS | {"feature_scale": -np.ones(4)}, "feature_scale is not positive"),
    ],
)
def test_wrong_arrays(tmp_path, tensors, text):
    save_file(tensors, tmp_path / "m", {"crossent": json.dumps(METADATA)})
    with pytest.raises(InputError, match=text):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        (None, "has no 'crossent' metadata"),
        ("{", "its metadata is no JSON"),
        ("[" * 100_000, "its metadata is no JSON"),
        ([], "needs exactly the keys"),
        (without(METADATA, "classes"), "needs exactly the keys"),
        (METADATA | {"format_version": 2}, "format version 2, and this crossent reads version 1"),
        (METADATA | {"classes": ["a", "b", "a"]}, "distinct labels of one type"),
        (METADATA | {"classes": ["a", "b", 3]}, "distinct labels of one type"),
        (METADATA | {"classes": [0, 1, True]}, "distinct labels of one type"),
        (METADATA | {"classes": [0, 1, 2**63]}, "distinct labels of one type"),
        (METADATA | {"classes": [0.5, 1.5, 2.5]}, "distinct labels of one type"),
        (METADATA | {"classes": ["a", "b", "\ud800"]}, "distinct labels of one type"),
        (METADATA | {"classes": [[], [], []]}, "distinct labels of one type"),
        (METADATA | {"classes": "abc"}, "distinct labels of one type"),
        (METADATA | {"feature_names": ["w", "x", "y", "w"]}, "feature names are not distinct"),
        (METADATA | {"feature_names": ["w", "x", "y", 3]}, "feature names are not distinct"),
        (METADATA | {"feature_names": []}, "feature names are not distinct"),
        (METADATA | {"image_shape": [2, 3]}, "image shape does not fit"),
        (METADATA | {"image_shape": [4]}, "image shape does not fit"),
        (METADATA | {"image_shape": [-2, -2]}, "image shape does not fit"),
        (METADATA | {"image_shape": "22"}, "image shape does not fit"),
    ],
)
def test_wrong_metadata(tmp_path, metadata, text):
    entry = metadata if isinstance(metadata, str) else json.dumps(metadata)
    save_file(TENSORS, tmp_path / "m", None if metadata is None else {"crossent": entry})
    with pytest.raises(InputError, match=text):
        load(tmp_path / "m")


def test_damage_anywhere_is_an_input_error(tmp_path):
    save(MODEL, tmp_path / "m")
    sound = (tmp_path / "m").read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for trial in range(400):
        damaged = bytearray(sound)
        damaged[rng.integers(len(sound) // 2)] = rng.integers(256)
        content = bytes(damaged) if trial % 2 else sound[: rng.integers(len(sound))]
        (tmp_path / "m").write_bytes(content)
        try:
            load(tmp_path / "m")
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 300


def test_absent_and_absurd_files(tmp_path):
    with pytest.raises(InputError, match=r"no such file: .*model\.safetensors"):
        load(tmp_path)
    for content in (b"", b"\xff" * 8, (10**15).to_bytes(8, "little") + b"{}"):
        (tmp_path / "m").write_bytes(content)
        with pytest.raises(InputError, match="cannot be read as a model"):
            load(tmp_path / "m")


def test_every_array_is_checked():
    assert set(ARRAYS) == set(TENSORS)

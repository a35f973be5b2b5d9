"""Linear probes: the network never sees their classes, and they never copy its features."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("polars")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

PAGE = Path(__file__).parents[1] / "docs" / "linear-probe.md"


@pytest.fixture(scope="module")
def probes(example):
    torch = pytest.importorskip("torch")
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    with example("linear_probe") as module:
        yield module
    torch.use_deterministic_algorithms(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture(scope="module")
def halves(probes, idx_folder):
    return probes.split_classes(idx_folder, "train")


@pytest.fixture(scope="module")
def networks(probes, halves):
    return probes.descriptions(0, halves[0], epochs=2)


def test_the_network_sees_five_classes_and_the_probes_the_others(probes, idx_folder, halves):
    _, labels = probes.idx.read_part(idx_folder, "train")
    known, others = (half.target.numpy() for half in halves)
    np.testing.assert_array_equal(known, labels[labels < 5])
    np.testing.assert_array_equal(others + 5, labels[labels >= 5])
    for half in halves:
        assert half.input.shape == (len(half.target), 1, 28, 28)


def test_descriptions_are_a_network_s_layers_before_and_after(probes, halves, networks):
    """An untrained one is the start of the trained one; each is what the next builds on."""
    images = halves[1].input[:7]
    sizes = {name: layers(images).flatten(1).shape[1] for name, layers in networks.items()}
    assert list(sizes.values()) == [784, 3136, 1568, 64, 3136, 1568, 64, 5]
    start, trained = (networks[f"hidden layer, {state}"] for state in ("untrained", "trained"))
    for a, b in zip(start.parameters(), probes.network(0).parameters(), strict=False):
        assert a.equal(b)
    assert any(
        not a.equal(b) for a, b in zip(start.parameters(), trained.parameters(), strict=True)
    )
    assert networks["2nd convolution, trained"](images).equal(trained[:2](images))
    again = probes.network(0)
    probes.train(again, halves[0], epochs=2, seed=0)
    for a, b in zip(trained.parameters(), again.parameters(), strict=False):
        assert a.equal(b)


def test_training_learns_the_known_classes(probes, halves):
    model = probes.network(0)
    probes.train(model, halves[0], epochs=20, seed=0)
    assert probes.accuracy(model, halves[0]) > 0.9


def test_features_are_the_layer_s_on_one_scale(probes, halves, networks, tmp_path):
    layers, images = networks["hidden layer, trained"], halves[1].input
    scale = probes.write_features(tmp_path / "a.npy", layers, images, None)
    features = np.load(tmp_path / "a.npy", mmap_mode="r")
    np.testing.assert_allclose(features * scale, layers(images).numpy(), rtol=1e-5, atol=1e-6)
    assert np.mean(np.square(features)) == pytest.approx(1, rel=1e-4)
    assert probes.write_features(tmp_path / "b.npy", layers, images[:9], 2.0) == 2.0
    other = np.load(tmp_path / "b.npy")
    np.testing.assert_allclose(other * 2, layers(images[:9]).numpy(), rtol=1e-5, atol=1e-6)


def test_a_probe_chooses_c_without_the_test_images(probes):
    rng = np.random.default_rng(0)
    target = np.arange(100) % 5
    features = (rng.normal(size=(100, 8)) + 2 * np.eye(5, 8)[target]).astype(np.float32)
    first = probes.probe(features, target, features, target, 100)
    second = probes.probe(features, target, features, target[::-1], 100)
    assert first.C == second.C
    assert first.accuracy > 0.7 > second.accuracy
    assert min(probes.C_PATH) < first.C < max(probes.C_PATH)


def test_a_probe_copies_no_mapped_features(probes, tmp_path):
    """Of 64 MB: all but a few columns are zeros, so that the fits are short."""
    shape = (40_000, 400)
    written = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, shape)
    target = np.arange(len(written)) % 5
    rng = np.random.default_rng(1)
    written[:, :5] = np.eye(5)[target] + rng.normal(size=(len(written), 5))
    written.flush()
    features = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = probes.probe(features, target, features[:100], target[:100], len(features))
    assert found.megabytes == 64
    assert found.taken < 32
    assert found.accuracy > 0.4


def test_command_line_and_page(probes, idx_folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "figure.svg"
    given = ["--epochs", "1", "--labels", "100", "50", "--data-dir"]
    probes.main([*given, str(idx_folder), "--plot", str(figure)])
    lines = capsys.readouterr().out.splitlines()
    page = PAGE.read_text(encoding="utf-8")
    tables = [i for i, line in enumerate(lines) if ", by number of labels" in line]
    assert len(tables) == 3
    for i in tables:
        assert lines[i].split()[-2:] == ["50", "100"]
        assert lines[i][:36].rstrip() in page
        for line in lines[i + 1 : i + 9]:
            assert line[:34].rstrip() in page
    assert lines[1].startswith("The probes tell Sandal, Shirt, Sneaker, Bag, Ankle boot apart")
    assert "its five outputs, trained" in figure.read_text(encoding="utf-8")


def test_says_what_is_wrong_before_it_trains(probes, idx_folder, tmp_path, capsys):
    for given, text in (
        (["--data-dir", str(tmp_path)], "apt install dataset-fashion-mnist"),
        (["--data-dir", str(idx_folder), "--labels", "999"], "there are 260 images"),
        (["--labels", "49"], "less than 50"),
        (["--plot", f"{tmp_path}/a/b"], "no folder"),
    ):
        with pytest.raises(SystemExit):
            probes.main(given)
        assert text in " ".join(capsys.readouterr().err.split())


def test_says_what_it_needs(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match="needs torch"), example("linear_probe"):
        pass

"""New folders and files appear whole or not at all, and replace nothing unasked."""

import os

import pytest

from crossent.cli.errors import InputError
from crossent.cli.output import new_file, new_folder, unused

OURS = frozenset({"a", "b"})


def listing(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def make(folder, text="new", force=False):
    with new_folder(folder, force, OURS) as staging:
        (staging / "a").write_text(text)


def test_a_folder_appears_whole(tmp_path):
    with new_folder(tmp_path / "out", False, OURS) as staging:
        (staging / "a").write_text("new")
        assert not (tmp_path / "out").exists()
    assert listing(tmp_path) == ["out", "out/a"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_left_of_a_failure(tmp_path, error, force):
    if force:
        make(tmp_path / "out", "old")
    before = listing(tmp_path)
    with pytest.raises(error), new_folder(tmp_path / "out", force, OURS) as staging:  # noqa: PT012
        (staging / "a").write_text("new")
        raise error
    assert listing(tmp_path) == before
    with pytest.raises(error), new_file(tmp_path / "f", force) as staging:  # noqa: PT012
        staging.write_text("new")
        raise error
    assert listing(tmp_path) == before


def test_force_replaces_a_folder_of_ours_only(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(InputError, match="exists already; choose another --output, or replace it"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "a").read_text() == "old"
    (tmp_path / "out" / "b").write_text("gone with the old folder")
    make(tmp_path / "out", "new", force=True)
    assert listing(tmp_path) == ["out", "out/a"]
    assert (tmp_path / "out" / "a").read_text() == "new"

    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other things too \(notes.txt\)"):
        make(tmp_path / "out", force=True)
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "file"):
        with pytest.raises(InputError, match="is not a folder"):
            make(tmp_path / name, force=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with (  # noqa: PT012
        pytest.raises(InputError, match="exists already"),
        new_folder(tmp_path / "out", False, OURS) as staging,
    ):
        (staging / "a").write_text("new")
        (tmp_path / "out").mkdir()
    assert listing(tmp_path) == ["out"]


def test_files(tmp_path):
    with new_file(tmp_path / "f", False) as staging:
        staging.write_text("new")
    assert listing(tmp_path) == ["f"]
    with pytest.raises(InputError, match="exists already"), new_file(tmp_path / "f", False):
        pass
    with new_file(tmp_path / "f", True) as staging:
        staging.write_text("newer")
    assert (tmp_path / "f").read_text() == "newer"
    with (
        pytest.raises(InputError, match="is a folder; name a file in it"),
        new_file(tmp_path, True),
    ):
        pass


@pytest.mark.parametrize("open_new", [new_file, lambda path, force: new_folder(path, force, OURS)])
def test_places_that_cannot_be_written(tmp_path, open_new):
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "absent", tmp_path / "file"):
        with pytest.raises(InputError, match="is no folder, so x cannot be made there"):
            open_new(parent / "x", False).__enter__()
    with pytest.raises(InputError, match="/proc"):
        open_new(type(tmp_path)("/proc/x"), False).__enter__()


def test_an_unused_name_counts_on_from_what_exists(tmp_path):
    folder = tmp_path / "crossent-digits"
    assert unused(folder) == folder
    folder.mkdir()
    (tmp_path / "crossent-digits-2").symlink_to("nowhere")  # a dangling link is in use too
    assert unused(folder) == tmp_path / "crossent-digits-3"

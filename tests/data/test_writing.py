"""Folders written whole or not at all: names, races, what a killed process left."""

import errno
from pathlib import Path

import pytest

from data.errors import InputError
from data.writing import new_folder, put_in_place, recover, require_new


def write(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "file").write_text(text)
    return folder


def test_a_folder_has_its_name_when_it_is_whole(tmp_path: Path):
    output = tmp_path / "out"
    write(tmp_path / "out.replaced", "of somebody else")
    with new_folder(output) as folder:
        write(folder / "inner", "text")
        assert not output.exists()
    assert (output / "inner" / "file").read_text() == "text"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "out.replaced"]


def test_an_error_leaves_nothing(tmp_path: Path):
    def fails() -> None:
        with new_folder(tmp_path / "out") as folder:
            write(folder / "inner", "text")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert not list(tmp_path.iterdir())


def test_who_was_faster_keeps_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where the other one comes between the last look and the renaming."""
    output = tmp_path / "out"
    with pytest.raises(InputError, match="out: it exists"), new_folder(output):
        write(output, "theirs")
    looks: list[Path] = []

    def late(path: Path) -> None:
        looks.append(path)
        if len(looks) > 1:
            require_new(path)

    monkeypatch.setattr("data.writing.require_new", late)
    with pytest.raises(InputError, match="out: it exists"), new_folder(output) as folder:
        (folder / "file").write_text("ours")
    assert (output / "file").read_text() == "theirs"
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("left", ["between", "behind"])
def test_what_a_killed_process_left_is_mended(left: str, tmp_path: Path):
    folder = tmp_path / "best"
    write(tmp_path / "best.replaced", "old")
    if left == "behind":
        write(folder, "new")
    recover(folder)
    assert (folder / "file").read_text() == ("old" if left == "between" else "new")
    write(tmp_path / "best.replaced", "older")
    put_in_place(write(tmp_path / "aside", "newest"), folder)
    assert (folder / "file").read_text() == "newest"
    assert [one.name for one in tmp_path.iterdir()] == ["best"]


@pytest.mark.parametrize("name", ["there", "no/such/out"])
def test_what_cannot_be_new_is_refused(name: str, tmp_path: Path):
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match=r"--output .*(it exists|does not exist)"):
        require_new(tmp_path / name)


def test_a_name_too_long_is_the_systems_error(tmp_path: Path):
    with pytest.raises(OSError, match="too long") as error, new_folder(tmp_path / ("x" * 300)):
        pass
    assert error.value.errno == errno.ENAMETOOLONG

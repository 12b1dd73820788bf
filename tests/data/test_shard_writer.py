import json
import os
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import shard_writer
from data.errors import InputError
from data.shard_writer import ShardWriter, append_bytes, write_json

DTYPE = np.dtype("<u2")


def new_writer(folder, shard_tokens: int = 10) -> ShardWriter:
    return ShardWriter(folder, {"options": {}}, shard_tokens, DTYPE)


def content(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != "progress.json"}


def write(writer: ShardWriter, documents, start: int = 0, stop_after: int | None = None) -> None:
    """Add documents [start, stop_after), commit at every third as the caller would."""
    for index, (split, length) in list(enumerate(documents))[start:stop_after]:
        tokens = np.arange(index, index + length, dtype=DTYPE)
        writer.add(split, tokens, text_bytes=length * 3, words=length)
        writer.position.documents_of_source = index + 1
        if index % 3 == 2:
            writer.commit()


documents = st.lists(
    st.tuples(st.sampled_from(["train", "valid"]), st.integers(1, 14)), min_size=1, max_size=25
)


@settings(max_examples=60, deadline=None)
@given(documents=documents, data=st.data())
def test_stopping_anywhere_changes_nothing(documents, data, tmp_path_factory):
    """Stop after any document, with anything written behind the last commit, and go on."""
    with mock.patch.object(shard_writer, "sync"):  # it would only wait for the disk
        stop_and_go_on(documents, data, tmp_path_factory)


def stop_and_go_on(documents, data, tmp_path_factory) -> None:
    whole, parts = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    writer = new_writer(whole)
    write(writer, documents)
    writer.finish()

    stop = data.draw(st.integers(1, len(documents)))
    first = new_writer(parts)
    first.commit()
    write(first, documents, 0, stop)
    if data.draw(st.booleans()):
        first._flush()  # bytes that no commit knows
    second = new_writer(parts)
    progress = json.loads((parts / "progress.json").read_text())
    second.resume(progress)
    write(second, documents, second.position.documents_of_source)
    second.finish()
    assert content(parts) == content(whole)
    assert second.splits == writer.splits


def test_bytes_behind_the_last_commit_are_cut_off(tmp_path):
    writer = new_writer(tmp_path)
    write(writer, [("train", 2)] * 4)  # committed after the third
    writer._flush()
    file = tmp_path / "train-00000.tokens.bin.partial"
    assert file.stat().st_size == 16
    new_writer(tmp_path).resume(json.loads((tmp_path / "progress.json").read_text()))
    assert file.stat().st_size == 12
    assert file.with_name("train-00000.docs.bin.partial").stat().st_size == 3 * 24


def test_shards_close_before_they_overflow(tmp_path):
    writer = new_writer(tmp_path)
    write(writer, [("train", n) for n in (4, 6, 1, 30, 2)])
    writer.finish()
    assert [s["tokens"] for s in writer.splits["train"].shards] == [10, 1, 30, 2]


def test_killed_between_commit_and_rename(tmp_path, monkeypatch):
    """The shard is finished by the record but still has its partial name."""
    writer = new_writer(tmp_path)
    monkeypatch.setattr(ShardWriter, "_finish_rename", lambda *_: None)
    write(writer, [("train", 9), ("train", 9)])
    monkeypatch.undo()
    assert (tmp_path / "train-00000.tokens.bin.partial").exists()
    second = new_writer(tmp_path)
    second.resume(json.loads((tmp_path / "progress.json").read_text()))
    assert second.position.documents_of_source == 1
    assert (tmp_path / "train-00000.tokens.bin").stat().st_size == 18


@pytest.mark.parametrize("name", ["train-00000.tokens.bin", "train-00001.docs.bin.partial"])
def test_lost_bytes_are_noticed(name, tmp_path):
    writer = new_writer(tmp_path)
    write(writer, [("train", 9), ("train", 5), ("train", 2)])
    os.truncate(tmp_path / name, 3)
    progress = json.loads((tmp_path / "progress.json").read_text())
    with pytest.raises(InputError, match=r"has 3 bytes, .* left \d+: begin anew with --overwrite"):
        new_writer(tmp_path).resume(progress)


def test_a_failed_write_leaves_the_old_json(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer.os, "write", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_json(path, {"new": 1})
    assert error.value.filename == str(tmp_path / "a.json.tmp")
    assert json.loads(path.read_text()) == {"old": 1}


def test_short_writes_are_continued(tmp_path, monkeypatch):
    write_some = os.write
    monkeypatch.setattr(shard_writer.os, "write", lambda fd, view: write_some(fd, view[:3]))
    append_bytes(tmp_path / "a", b"0123456789")
    append_bytes(tmp_path / "a", b"abc")
    assert (tmp_path / "a").read_bytes() == b"0123456789abc"

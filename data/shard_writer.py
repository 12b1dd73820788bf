"""Writing token shards so that a kill at any moment loses at most the tokens since the last commit.

Shards grow in `*.partial` files. A commit makes their bytes durable and then replaces
progress.json, which holds the position in the sources and the committed lengths. A restart cuts the
files back to these lengths and goes on.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.shards import PROGRESS, sha256_file

PARTIAL = ".partial"
KINDS = ("tokens", "docs")


def write_json(path: Path, value: Any) -> None:
    """Write `value`; after a power loss `path` has its old content or all of the new."""
    aside = path.with_name(path.name + ".tmp")
    aside.unlink(missing_ok=True)
    append_bytes(aside, (json.dumps(value, indent=1) + "\n").encode())
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def append_bytes(path: Path, content: bytes) -> None:
    """Append to a file. Unbuffered: a full disk is an error here, one that names the file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            view = memoryview(content)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def sync(path: Path) -> None:
    """Wait until a file (or a folder's list of names) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems report a full disk only here
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


@dataclass
class OpenShard:
    """Counts of a shard that still grows."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    words: int = 0
    max_token_id: int = 0


@dataclass
class Position:
    """How far the sources are consumed: whole ones, then documents (empty ones too) of the next."""

    source: int = 0
    documents_of_source: int = 0
    skipped_empty: int = 0
    input_documents: int = 0


@dataclass
class SplitState:
    """Finished shards of a split, as the manifest lists them, and the one that grows."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    open: OpenShard | None = None


class ShardWriter:
    """Appends documents to the shards of each split, in the order of the calls.

    Bytes wait in memory until `commit`, which the caller calls every few million tokens.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], shard_tokens: int, dtype: np.dtype):
        self.folder = folder
        self.identity = identity
        self.shard_tokens = shard_tokens
        self.dtype = dtype
        self.position = Position()
        self.splits: dict[str, SplitState] = {}
        self._waiting: dict[Path, list[bytes]] = {}
        self.uncommitted_tokens = 0

    def resume(self, progress: dict[str, Any]) -> None:
        """Take over what progress.json says; InputError where the files are shorter than that."""
        self.position = Position(**progress["position"])
        for name, state in progress["splits"].items():
            shard = OpenShard(**state["open"]) if state["open"] else None
            self.splits[name] = SplitState(state["shards"], shard)
            for index, finished in enumerate(state["shards"]):
                self._finish_rename(name, index, finished)
            if shard is not None:
                for kind in KINDS:
                    path = self._partial(name, len(state["shards"]), kind)
                    _truncate(path, self._length(shard, kind))

    def add(self, split: str, tokens: np.ndarray, text_bytes: int, words: int) -> None:
        """Append one document, in a new shard where it does not fit into the open one."""
        state = self.splits.setdefault(split, SplitState())
        if state.open and state.open.tokens + len(tokens) > self.shard_tokens:
            self._close(split)
        if state.open is None:
            state.open = OpenShard()
            for kind in KINDS:  # what a killed run began after its last commit
                self._partial(split, len(state.shards), kind).unlink(missing_ok=True)
        shard = state.open
        row = np.array([shard.tokens, text_bytes, words], dtype="<i8")
        for kind, content in (("tokens", tokens.tobytes()), ("docs", row.tobytes())):
            path = self._partial(split, len(state.shards), kind)
            self._waiting.setdefault(path, []).append(content)
        shard.tokens += len(tokens)
        shard.documents += 1
        shard.bytes += text_bytes
        shard.words += words
        shard.max_token_id = max(shard.max_token_id, int(tokens.max()))
        self.uncommitted_tokens += len(tokens)

    def commit(self) -> None:
        """Make everything added so far durable, together with `position`."""
        self._flush()
        splits = {
            name: {"shards": state.shards, "open": asdict(state.open) if state.open else None}
            for name, state in self.splits.items()
        }
        progress = {
            "format_version": 1,
            "identity": self.identity,
            "position": asdict(self.position),
            "splits": splits,
        }
        write_json(self.folder / PROGRESS, progress)
        self.uncommitted_tokens = 0

    def finish(self) -> None:
        """Close all shards."""
        for split, state in self.splits.items():
            if state.open is not None:
                self._close(split)

    def _close(self, split: str) -> None:
        """Commit the open shard as finished, and only then give it its final name.

        In this order a kill between the two leaves a partial file that `resume` can rename; the
        other way round it would leave a final name that no commit knows.
        """
        self._flush()
        state = self.splits[split]
        assert state.open is not None
        index = len(state.shards)
        entry: dict[str, Any] = asdict(state.open)
        for kind in KINDS:
            path = self._partial(split, index, kind)
            entry[f"{kind}_file"] = path.name.removesuffix(PARTIAL)
            entry[f"{kind}_sha256"] = sha256_file(path)
            entry[f"{kind}_file_bytes"] = path.stat().st_size
        state.shards.append(entry)
        state.open = None
        self.commit()
        self._finish_rename(split, index, entry)

    def _flush(self) -> None:
        for path, parts in self._waiting.items():
            append_bytes(path, b"".join(parts))
            sync(path)
        self._waiting.clear()

    def _finish_rename(self, split: str, index: int, entry: dict[str, Any]) -> None:
        for kind in KINDS:
            partial, final = self._partial(split, index, kind), self.folder / entry[f"{kind}_file"]
            if partial.exists():
                os.replace(partial, final)
            expected = entry[f"{kind}_file_bytes"]
            found = final.stat().st_size if final.exists() else 0
            if found != expected:
                raise _damaged(final, found, expected)

    def _partial(self, split: str, index: int, kind: str) -> Path:
        return self.folder / f"{split}-{index:05d}.{kind}.bin{PARTIAL}"

    def _length(self, shard: OpenShard, kind: str) -> int:
        return shard.tokens * self.dtype.itemsize if kind == "tokens" else shard.documents * 24


def _truncate(path: Path, length: int) -> None:
    found = path.stat().st_size if path.exists() else 0
    if found < length:
        raise _damaged(path, found, length)
    os.truncate(path, length)


def _damaged(path: Path, found: int, expected: int) -> InputError:
    return InputError(
        f"{path}: has {found} bytes, the interrupted preparation left {expected}: "
        "begin anew with --overwrite"
    )

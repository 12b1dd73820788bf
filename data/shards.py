"""Reading a prepared folder: manifest, integrity checks, and one token stream a split.

    manifest.json            written last: a folder with one is complete
    tokenizer.model          the SentencePiece model behind the ids
    train-00000.tokens.bin   little-endian ids, uint16 where the vocabulary fits, else uint32
    train-00000.docs.bin     little-endian int64 (documents, 3): first token, UTF-8 bytes, words

Documents never cross shards. Names in the manifest are relative: the folder can be moved.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.sources import Document
from data.tokenizer import TextTokenizer, Tokenizer

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"
PROGRESS = "progress.json"
TOKENIZER = "tokenizer.model"

# A mapped file keeps a file descriptor; a large corpus has more shards than a process may have
# descriptors.
_MAX_OPEN_SHARDS = 128


def token_dtype(vocab_size: int) -> np.dtype:
    """Little-endian dtype that holds every id of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenStream:
    """One split as one virtual concatenation of its shards' tokens.

    Attributes: documents, text_bytes (UTF-8 bytes of the texts), words (whitespace-separated). BOS
    tokens are part of the stream but stand for no bytes.
    """

    def __init__(
        self,
        lengths: list[int],
        tokens: Callable[[int], np.ndarray],
        docs: Callable[[int], np.ndarray],
        totals: tuple[int, int, int],
    ):
        """`tokens(i)` and `docs(i)` give shard i, which has lengths[i] tokens.

        totals: documents, bytes, words.
        """
        self._tokens = lru_cache(maxsize=_MAX_OPEN_SHARDS)(tokens)
        self._docs = docs
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        self.documents, self.text_bytes, self.words = totals

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens start .. start + count, int64 (count,), across shards.

        ValueError outside of the stream.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise ValueError(f"tokens {start} .. {start + count} are not in 0 .. {len(self)}")
        out = np.empty(count, dtype=np.int64)
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        done = 0
        while done < count:
            offset = start + done - int(self._starts[shard])
            part = self._tokens(shard)[offset : offset + count - done]
            out[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return out

    def document_starts(self) -> np.ndarray:
        """Index in the stream of every document's BOS, int64 (documents,), ascending."""
        shards = range(len(self._starts) - 1)
        parts = [self._docs(shard)[:, 0] + self._starts[shard] for shard in shards]
        return np.concatenate([np.empty(0, dtype=np.int64), *parts])

    @classmethod
    def from_documents(
        cls, texts: Iterable[Document | str], tokenizer: TextTokenizer
    ) -> "TokenStream":
        """A stream in memory, tokenised as preparation does; documents without text are skipped."""
        dtype = token_dtype(tokenizer.vocab_size)
        pieces: list[np.ndarray] = []
        rows: list[tuple[int, int, int]] = []
        length = 0
        for item in texts:
            text = item if isinstance(item, str) else item.text
            if not text.strip():
                continue
            pieces.append(np.array(tokenizer.encode_document(text), dtype=dtype))
            rows.append((length, len(text.encode()), len(text.split())))
            length += len(pieces[-1])
        tokens = np.concatenate([np.empty(0, dtype=dtype), *pieces])
        docs = np.array(rows, dtype=np.int64).reshape(-1, 3)
        totals = (len(rows), int(docs[:, 1].sum()), int(docs[:, 2].sum()))
        return cls([length], lambda _: tokens, lambda _: docs, totals)


class PreparedData:
    """A prepared folder whose every file was checked.

    Attributes: path, manifest (dict), tokenizer (Tokenizer).
    """

    def __init__(self, path: Path, manifest: dict[str, Any], tokenizer: Tokenizer):
        self.path = path
        self.manifest = manifest
        self.tokenizer = tokenizer

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "PreparedData":
        """Open and check a folder. `verify=False` skips only the shards' checksums (seconds a GB).

        Raises InputError that names the file, what was found and what was expected.
        """
        folder = Path(path)
        manifest = _read_manifest(folder)
        tokenizer = _open_tokenizer(folder, manifest)
        for shard in _all_shards(manifest):
            _check_shard(folder, shard, manifest, verify)
        return cls(folder, manifest, tokenizer)

    def split(self, name: str) -> TokenStream:
        """The tokens of a split. InputError where the folder has none of this name."""
        splits = self.manifest["splits"]
        if name not in splits:
            raise InputError(
                f"{self.path}: has no split '{name}'; it has: {', '.join(splits)}. Prepare it with "
                f"--{name}_input or --{name}_fraction"
            )
        entry = splits[name]
        shards = entry["shards"]
        return TokenStream(
            [shard["tokens"] for shard in shards],
            partial(
                _map_tokens,
                self.path,
                shards,
                np.dtype(self.manifest["token_dtype"]).newbyteorder("<"),
            ),
            partial(_map_docs, self.path, shards),
            (entry["documents"], entry["bytes"], entry["words"]),
        )

    def split_sha256(self, name: str) -> str:
        """Tells the tokens of a split from any others: the sha256 of its shards' sha256 sums."""
        shards = self.manifest["splits"][name]["shards"]
        return hashlib.sha256("".join(s["tokens_sha256"] for s in shards).encode()).hexdigest()


def _map_tokens(folder: Path, shards: list[dict], dtype: np.dtype, index: int) -> np.ndarray:
    return np.memmap(folder / shards[index]["tokens_file"], dtype=dtype, mode="r")


def _map_docs(folder: Path, shards: list[dict], index: int) -> np.ndarray:
    return np.fromfile(folder / shards[index]["docs_file"], dtype="<i8").reshape(-1, 3)


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(_not_prepared(folder)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}: is not valid JSON ({error}); prepare the folder again with --overwrite"
        ) from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version is {version!r}; this code reads {FORMAT_VERSION}: "
            "prepare the folder again with --overwrite"
        )
    _check_keys(manifest, _MANIFEST_KEYS, str(file))
    _check_keys(manifest["tokenizer"], _TOKENIZER_KEYS, f"{file}: tokenizer")
    for name, split in manifest["splits"].items():
        _check_split(split, f"{file}: splits.{name}")
    return manifest


_MANIFEST_KEYS: dict[str, type] = {
    "created_by": dict,
    "tokenizer": dict,
    "token_dtype": str,
    "splits": dict,
    "inputs": list,
}
_TOKENIZER_KEYS: dict[str, type] = {"file": str, "sha256": str, "vocab_size": int, "bos_id": int}
_COUNTS: dict[str, type] = {"tokens": int, "documents": int, "bytes": int, "words": int}
_SHARD_KEYS: dict[str, type] = {
    **_COUNTS,
    "max_token_id": int,
    "tokens_file": str,
    "tokens_file_bytes": int,
    "tokens_sha256": str,
    "docs_file": str,
    "docs_file_bytes": int,
    "docs_sha256": str,
}


def _check_split(split: Any, where: str) -> None:
    _check_keys(split, {**_COUNTS, "shards": list}, where)
    for index, shard in enumerate(split["shards"]):
        _check_keys(shard, _SHARD_KEYS, f"{where}.shards[{index}]")
    for key in _COUNTS:
        total = sum(shard[key] for shard in split["shards"])
        if total != split[key]:
            raise InputError(
                f"{where}: '{key}' is {split[key]}, its shards sum up to {total}; "
                "prepare the folder again with --overwrite"
            )


def _check_keys(value: Any, keys: dict[str, type], where: str) -> None:
    if not isinstance(value, dict):
        raise InputError(f"{where}: is not an object; prepare the folder again with --overwrite")
    for key, kind in keys.items():
        if not isinstance(value.get(key), kind):
            raise InputError(
                f"{where}: '{key}' is {value.get(key)!r}, expected a {kind.__name__}; "
                "prepare the folder again with --overwrite"
            )


def _not_prepared(folder: Path) -> str:
    if (folder / PROGRESS).exists():
        return (
            f"{folder}: its preparation was interrupted; run the same `python -m data.prepare` "
            f"command again to finish it: python -m data.prepare ... --output {folder}"
        )
    what = f"has no {MANIFEST}" if folder.is_dir() else "no such folder"
    return (
        f"{folder}: {what}; prepare it first: python -m data.prepare --input FILES "
        f"--vocab_size 32000 --output {shlex.quote(str(folder))} "
        "(--embedded instead of --input FILES needs no download)"
    )


def _open_tokenizer(folder: Path, manifest: dict[str, Any]) -> Tokenizer:
    expected = manifest["tokenizer"]
    tokenizer = Tokenizer(_inside(folder, expected["file"]))
    if tokenizer.sha256 != expected["sha256"]:
        raise InputError(
            f"{tokenizer.path}: is not the tokenizer of these shards: sha256 {tokenizer.sha256}, "
            f"expected {expected['sha256']}"
        )
    if (tokenizer.vocab_size, tokenizer.bos_id) != (expected["vocab_size"], expected["bos_id"]):
        raise InputError(
            f"{folder / MANIFEST}: tokenizer: vocab_size {expected['vocab_size']}, bos_id "
            f"{expected['bos_id']}; the model has {tokenizer.vocab_size}, {tokenizer.bos_id}"
        )
    if manifest["token_dtype"] not in ("uint16", "uint32"):
        raise InputError(
            f"{folder / MANIFEST}: token_dtype is {manifest['token_dtype']!r}; "
            "allowed: uint16, uint32"
        )
    return tokenizer


def _all_shards(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in manifest["splits"].values() for shard in split["shards"]]


def _check_shard(folder: Path, shard: dict, manifest: dict, verify: bool) -> None:
    tokens_bytes = shard["tokens"] * np.dtype(manifest["token_dtype"]).itemsize
    for kind, needed in (("tokens", tokens_bytes), ("docs", shard["documents"] * 24)):
        file = _inside(folder, shard[f"{kind}_file"])
        _check_size(file, shard[f"{kind}_file_bytes"], needed)
        if verify:
            _check_sum(file, shard[f"{kind}_sha256"])
    vocab_size = manifest["tokenizer"]["vocab_size"]
    if shard["max_token_id"] >= vocab_size:
        raise InputError(
            f"{folder / shard['tokens_file']}: holds token id {shard['max_token_id']}; "
            f"the tokenizer's vocab_size is {vocab_size}"
        )


def _check_size(file: Path, expected: int, needed: int) -> None:
    try:
        found = file.stat().st_size
    except FileNotFoundError as error:
        raise InputError(
            f"{file}: shard is missing; prepare the folder again with --overwrite"
        ) from error
    if found != expected or found != needed:
        raise InputError(
            f"{file}: has {found} bytes, expected {expected if found != expected else needed}: "
            "truncated or changed; prepare the folder again with --overwrite"
        )


def _check_sum(file: Path, expected: str) -> None:
    found = sha256_file(file)
    if found != expected:
        raise InputError(
            f"{file}: sha256 is {found}, expected {expected}: damaged; "
            "prepare the folder again with --overwrite"
        )


def _inside(folder: Path, name: str) -> Path:
    """The file `name` of the folder; a manifest must not make us read other places."""
    if Path(name).name != name:
        raise InputError(f"{folder / MANIFEST}: file name {name!r} is not a plain name")
    return folder / name

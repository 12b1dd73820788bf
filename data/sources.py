"""Documents from files, Hugging Face datasets and the embedded corpus, one stream a source.

A source is one file or one split: the unit that preparation can skip whole when it is restarted.
Sources stream: only a text that is one document is ever in memory whole.
"""

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import embedded
from data.errors import InputError
from data.text_files import COMPRESSIONS, decode, decoded_lines, open_bytes, reading

# SentencePiece needs about 50 bytes of memory for each byte of the text that it encodes.
MAX_DOCUMENT_BYTES = 2**27

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".raw", ".tokens")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIXES = (".parquet",)
ALLOWED = (
    f"text {' '.join(TEXT_SUFFIXES)}, JSON lines {' '.join(JSONL_SUFFIXES)} "
    f"(both also with {' '.join(COMPRESSIONS)}), Parquet {' '.join(PARQUET_SUFFIXES)}"
)


@dataclass
class Document:
    """One text and where it came from (`file:line` or the like), for messages."""

    text: str
    where: str


@dataclass
class Source:
    """One file, one dataset split, or the embedded corpus.

    `size` (bytes) and `mtime_ns` tell whether it changed; None where that cannot be known (streamed
    datasets).
    """

    name: str
    size: int | None
    mtime_ns: int | None
    read: Callable[[], Iterator[Document]]

    def documents(self) -> Iterator[Document]:
        """All documents, empty ones too. InputError where there is not even one."""
        found = False
        for document in self.read():
            found = True
            yield document
        if not found:
            raise InputError(f"{self.name}: is empty; allowed is a source of at least one document")


@dataclass(frozen=True)
class Reading:
    """How texts are taken from files and rows.

    text_key: the field or column that holds the text. document_start: a line that matches begins a
    new document; None: a text file is one document and so is a row.
    """

    text_key: str = "text"
    document_start: str | None = None


def file_sources(paths: Iterable[str], how: Reading) -> list[Source]:
    """Sources of the files, folders (recursive, sorted) and glob patterns in `paths`."""
    found = [file for path in paths for file in _expand(path)]
    return [_file_source(path, how) for path in found]


def embedded_source() -> Source:
    """The embedded corpus as one source."""

    def read() -> Iterator[Document]:
        return (Document(text, name) for name, text in embedded.embedded_documents())

    return Source(embedded.embedded_name(), embedded.embedded_bytes(), None, read)


def dataset_source(
    name: str, config: str | None, split: str | None, streaming: bool, how: Reading
) -> Source:
    """A split of a Hugging Face dataset: `name` on the hub, or a folder of `save_to_disk`."""
    label = ":".join(part for part in (name, config, split) if part)

    def read() -> Iterator[Document]:
        rows = _load_dataset(name, config, split, streaming)
        return _documents(_checked_rows(_dataset_rows(rows, label), how.text_key), how)

    return Source(label, None, None, read)


def _expand(path: str) -> list[Path]:
    """The files that `path` stands for: itself, the files under it, or what its pattern matches."""
    try:
        mode_is_folder = os.path.isdir(path)
        os.stat(path)
    except FileNotFoundError:
        matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
        if not matches:
            what = "no file matches this pattern" if glob.has_magic(path) else "no such file"
            raise InputError(
                f"input {path}: {what}; allowed is a file, folder or pattern"
            ) from None
        return [file for match in matches for file in _expand(match)]
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"input {path}: cannot be read ({reason})") from error
    return _files_under(Path(path)) if mode_is_folder else [Path(path)]


def _files_under(folder: Path) -> list[Path]:
    """Files of allowed suffixes under `folder`; others (a LICENSE, say) are passed over."""
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        raise InputError(f"input {folder}: is a saved dataset; give it as --dataset {folder}")
    files = sorted(
        Path(where, name)
        for where, _, names in os.walk(folder, onerror=_raise)
        for name in names
        if _kind(Path(name)) and not name.startswith(".")
    )
    if not files:
        raise InputError(f"input {folder}: no file of an allowed type; allowed: {ALLOWED}")
    return files


def _raise(error: OSError) -> None:
    raise error


def _kind(path: Path) -> str | None:
    """'text', 'jsonl' or 'parquet' by the suffix, None where it is none of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    if suffix in TEXT_SUFFIXES:
        return "text"
    if suffix in JSONL_SUFFIXES:
        return "jsonl"
    return "parquet" if suffix in PARQUET_SUFFIXES and not packed else None


def _file_source(path: Path, how: Reading) -> Source:
    readers = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}
    kind = _kind(path)
    if kind is None:
        raise InputError(f"input {path}: unknown file type '{path.suffix}'; allowed: {ALLOWED}")
    with reading(path):
        stat = path.stat()
    if stat.st_size == 0:
        raise InputError(f"input {path}: is empty (0 bytes); allowed is a file with text")
    return Source(str(path), stat.st_size, stat.st_mtime_ns, lambda: readers[kind](path, how))


def _read_text(path: Path, how: Reading) -> Iterator[Document]:
    with open_bytes(path) as file:
        if how.document_start is not None:
            lines = ((line, f"{path}:{number}") for number, line in decoded_lines(file, path))
            yield from _cut(lines, how.document_start)
            return
        raw = file.read(MAX_DOCUMENT_BYTES + 1)
        if len(raw) > MAX_DOCUMENT_BYTES:
            raise _too_long(str(path))
        if raw:
            yield Document(decode(raw, path), str(path))


def _read_jsonl(path: Path, how: Reading) -> Iterator[Document]:
    with open_bytes(path) as file:
        yield from _documents(_checked_rows(_jsonl_rows(file, path), how.text_key), how)


def _jsonl_rows(file: Any, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in decoded_lines(file, path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}:{number}: malformed JSON ({error}); allowed is one JSON object a line"
            ) from error
        yield row, f"{path}:{number}"


def _read_parquet(path: Path, how: Reading) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if how.text_key not in names:
                raise _no_key(str(path), how.text_key, names)
            yield from _documents(_checked_rows(_parquet_rows(file, path, how), how.text_key), how)
    except (pa.ArrowException, OSError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(f"{path}: is not a Parquet file or is damaged ({first})") from error


def _parquet_rows(file: Any, path: Path, how: Reading) -> Iterator[tuple[Any, str]]:
    number = 0
    for batch in file.iter_batches(batch_size=1024, columns=[how.text_key]):
        for value in batch.column(0):
            number += 1
            where = f"{path}:row {number}"
            try:
                yield {how.text_key: value.as_py()}, where
            except UnicodeDecodeError as error:
                raise InputError(f"{where}: '{how.text_key}' is not UTF-8") from error


def _load_dataset(name: str, config: str | None, split: str | None, streaming: bool) -> Any:
    import datasets

    try:
        if not os.path.isdir(name):
            return datasets.load_dataset(name, config, split=split, streaming=streaming)
        loaded = datasets.load_from_disk(name)
    except Exception as error:  # the hub's client raises whatever its transport does
        raise InputError(f"dataset {name}: cannot be loaded ({_first_line(error)})") from error
    if not isinstance(loaded, dict):
        return loaded
    if split not in loaded:
        raise InputError(f"dataset {name}: has no split '{split}'; it has: {', '.join(loaded)}")
    return loaded[split]


def _dataset_rows(rows: Any, label: str) -> Iterator[tuple[Any, str]]:
    number = 0
    iterator = iter(rows)
    while True:
        number += 1
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # as above; the same command goes on where it stopped
            raise InputError(
                f"{label}: row {number} cannot be read ({_first_line(error)}); "
                "run the same command again to go on"
            ) from error
        yield row, f"{label}:row {number}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]


def _checked_rows(rows: Iterator[tuple[Any, str]], key: str) -> Iterator[tuple[str, str]]:
    """Yield (text, where) of rows, each a mapping with a string under `key`."""
    for row, where in rows:
        if not isinstance(row, dict):
            raise InputError(
                f"{where}: is {_json_type(row)}, not an object; allowed is an object with '{key}'"
            )
        if key not in row:
            raise _no_key(where, key, list(row))
        text = row[key]
        if not isinstance(text, str):
            raise InputError(f"{where}: '{key}' is {_json_type(text)}; allowed is a string")
        yield text, where


def _documents(rows: Iterator[tuple[str, str]], how: Reading) -> Iterator[Document]:
    if how.document_start is not None:
        joined = ((text if text.endswith("\n") else text + "\n", where) for text, where in rows)
        yield from _cut(joined, how.document_start)
        return
    for text, where in rows:
        yield _document(text, where)


def _cut(lines: Iterator[tuple[str, str]], document_start: str) -> Iterator[Document]:
    """Join lines into documents; a line that matches `document_start` begins a new one."""
    begins = re.compile(document_start)
    parts: list[str] = []
    size = 0
    first = ""
    for line, where in lines:
        if parts and begins.search(line.rstrip("\r\n")):
            yield _document("".join(parts), first)
            parts, size = [], 0
        first = first if parts else where
        parts.append(line)
        size += len(line)
        if size > MAX_DOCUMENT_BYTES:
            raise _too_long(first)
    if parts:
        yield _document("".join(parts), first)


def _document(text: str, where: str) -> Document:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair: "\ud800"
        raise InputError(
            f"{where}: character {error.start} is half of a surrogate pair; "
            "allowed is valid Unicode"
        ) from error
    if size > MAX_DOCUMENT_BYTES:
        raise _too_long(where)
    return Document(text, where)


def _too_long(where: str) -> InputError:
    return InputError(
        f"{where}: the document is longer than {MAX_DOCUMENT_BYTES} bytes; "
        "cut it with --document_start (a regular expression for its documents' first lines)"
    )


def _no_key(where: str, key: str, there: list[str]) -> InputError:
    return InputError(f"{where}: has no '{key}'; --text_key may be one of: {', '.join(there)}")


def _json_type(value: Any) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "a boolean"}
    return names.get(type(value), f"of type {type(value).__name__}")

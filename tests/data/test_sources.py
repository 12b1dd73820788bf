import bz2
import gzip
import json
import lzma
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data import sources, text_files
from data.errors import InputError
from data.sources import Reading, dataset_source, embedded_source, file_sources

PACKERS = {
    "": lambda raw: raw,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}
TEXTS = ["first\nof two lines", "zweiter — mit Ümlaut", "", "😀 last\n"]


def jsonl(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, key: text}) + "\n" for text in texts).encode()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(*paths: object, **how: str) -> list[str]:
    found = file_sources([str(path) for path in paths], Reading(**how))
    return [document.text for source in found for document in source.documents()]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".ndjson"])
def test_jsonl(packing, suffix, tmp_path):
    path = write(tmp_path / f"a{suffix}{packing}", PACKERS[packing](jsonl(TEXTS)))
    assert read(path) == TEXTS
    (source,) = file_sources([str(path)], Reading())
    assert [d.where for d in source.documents()] == [f"{path}:{n}" for n in (1, 2, 3, 4)]
    stat = path.stat()
    assert (source.name, source.size) == (str(path), stat.st_size)
    assert source.mtime_ns == stat.st_mtime_ns


@pytest.mark.parametrize("packing", PACKERS)
def test_text_is_one_document(packing, tmp_path):
    text = "a line\r\n\n  and\tanother 😀\n"
    path = write(tmp_path / f"a.txt{packing}", PACKERS[packing](text.encode()))
    assert read(path) == [text]


def test_byte_order_mark_is_dropped(tmp_path):
    assert read(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")) == ["hello"]
    assert read(write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl(["x"]))) == ["x"]


def test_several_zstd_frames(tmp_path, monkeypatch):
    """Reading in small pieces makes frames end inside of, and between, them."""
    monkeypatch.setattr(text_files, "_READ_BYTES", 7)
    pack = zstandard.ZstdCompressor().compress
    path = write(tmp_path / "a.jsonl.zst", b"".join(pack(jsonl([text])) for text in TEXTS))
    assert read(path) == TEXTS


def test_document_start_cuts_text(tmp_path):
    text = " \n = One = \nbody\n = = Section = = \nmore\n = Two = \nend"
    path = write(tmp_path / "wiki.tokens", text.encode())
    parts = read(path, document_start="^ = [^=].* = $")
    assert "".join(parts) == text
    assert parts == [" \n", " = One = \nbody\n = = Section = = \nmore\n", " = Two = \nend"]
    assert read(path, document_start="^") == text.splitlines(keepends=True)


def test_document_start_joins_rows(tmp_path):
    rows = [" = One = \n", "", "body", " = Two = ", "end\n"]
    expected = [" = One = \n\nbody\n", " = Two = \nend\n"]
    assert read(write(tmp_path / "a.jsonl", jsonl(rows)), document_start="^ = ") == expected
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", document_start="^ = ") == expected


def test_text_key(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(TEXTS, key="content"))
    assert read(path, text_key="content") == TEXTS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_parquet(kind, tmp_path):
    texts = [f"{text}{n}" for n in range(800) for text in TEXTS]
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1000)
    assert read(tmp_path / "a.parquet") == texts


def test_folders_and_patterns_are_sorted(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a/x.jsonl", "c.text", ".hidden.txt", "LICENSE"):
        content = jsonl([name]) if name.endswith("jsonl") else name.encode()
        write(tmp_path / name, content)
    assert read(tmp_path) == ["a/x.jsonl", "b/10.txt", "b/2.txt", "c.text"]
    assert read(tmp_path / "b" / "*.txt") == ["b/10.txt", "b/2.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["b/10.txt", "b/2.txt"]
    assert read(tmp_path / "c.text", tmp_path / "b") == ["c.text", "b/10.txt", "b/2.txt"]


def test_a_name_with_brackets_is_no_pattern(tmp_path):
    assert read(write(tmp_path / "a[1].txt", b"hello")) == ["hello"]


def test_files_are_streamed(tmp_path):
    """The second line is bad; whoever stops after the first must not notice."""
    path = write(tmp_path / "a.jsonl", jsonl(["fine"]) + b"bad\n")
    (source,) = file_sources([str(path)], Reading())
    assert next(source.documents()).text == "fine"


# Each: name of the file, its content, options, and what the message must say besides the file.
BAD_FILES = {
    "empty file": ("a.txt", b"", [], "is empty (0 bytes)"),
    "empty after unpacking": ("a.jsonl.gz", gzip.compress(b""), [], "is empty"),
    "only blank lines": ("a.jsonl", b"\n \n", [], "is empty; allowed"),
    "not UTF-8": ("a.txt", b"caf\xe9 au lait", [], "byte 3 (0xe9) is not UTF-8"),
    "not UTF-8 after a mark": ("a.txt", b"\xef\xbb\xbfcaf\xe9", [], "byte 6 (0xe9)"),
    "not UTF-8, lines": (
        "a.txt",
        b"one\ntwo\nthr\xff\n",
        ["--document_start", "^"],
        "byte 11 (0xff) is not UTF-8",
    ),
    "not UTF-8, JSON": ("a.jsonl", jsonl(["x"]) + b'{"text": "\xff"}', [], "byte 33 (0xff)"),
    "malformed JSON": ("a.jsonl", jsonl(["x"]) + b'{"text": \n', [], ":2: malformed JSON"),
    "JSON list": ("a.json", b'["text"]', [], ":1: is a list, not an object"),
    "deep JSON": ("a.jsonl", b"[" * 100_000, [], ":1: malformed JSON"),
    "no text key": ("a.jsonl", b'{"id": 1, "content": "x"}', [], "may be one of: id, content"),
    "text is null": ("a.jsonl", b'{"text": null}', [], ":1: 'text' is null; allowed is a string"),
    "text is a list": ("a.jsonl", b'{"text": ["x"]}', [], "'text' is a list"),
    "half a surrogate": ("a.jsonl", b'{"text": "ab\\ud800"}', [], "character 2 is half of a"),
    "unknown suffix": ("a.pdf", b"%PDF", [], "unknown file type '.pdf'; allowed: text .txt"),
    "no suffix": ("readme", b"hello", [], "unknown file type ''"),
    "compressed parquet": ("a.parquet.gz", b"x", [], "unknown file type '.gz'"),
    "not parquet": ("a.parquet", b"PAR1 no", [], "is not a Parquet file or is damaged"),
    "not gzip": ("a.txt.gz", b"hello", [], "compressed data are damaged"),
    "not bzip2": ("a.txt.bz2", b"hello", [], "compressed data are damaged"),
    "not xz": ("a.txt.xz", b"hello", [], "compressed data are damaged"),
    "not zstd": ("a.txt.zst", b"hello", [], "compressed data are damaged"),
    "bad expression": ("a.txt", b"x", ["--document_start", "("], "is not a regular expression"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(case, tmp_path, refused):
    name, content, options, message = BAD_FILES[case]
    path = write(tmp_path / name, content)
    error = refused("--input", path, *options)
    assert message in error
    assert str(path) in error or case == "bad expression"


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("lost", [1, 3, 500])
def test_truncated_compressed_file(packing, lost, tmp_path, refused):
    numbers = "\n".join(str(n * n) for n in range(2000)).encode()
    path = write(tmp_path / f"a.txt{packing}", PACKERS[packing](numbers)[:-lost])
    assert f"{path}: the compressed data end too early" in refused("--input", path)


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_compressed_file(packing, tmp_path, refused):
    pack = PACKERS[packing]
    if packing == ".zst":
        pack = zstandard.ZstdCompressor(write_checksum=True).compress
    packed = bytearray(pack("\n".join(str(n * n) for n in range(2000)).encode()))
    packed[len(packed) // 2] ^= 0x55
    path = write(tmp_path / f"a.txt{packing}", bytes(packed))
    assert f"{path}: the compressed data" in refused("--input", path)


def test_damaged_parquet(tmp_path, refused):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [str(n * n) for n in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[4:2000] = b"\xff" * 1996
    path.write_bytes(content)
    assert f"{path}: is not a Parquet file or is damaged" in refused("--input", path)


def test_parquet_columns(tmp_path, refused):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1], "content": ["x"]}), path)
    assert "has no 'text'; --text_key may be one of: id, content" in refused("--input", path)
    assert "row 1: 'id' is of type int" in refused("--input", path, "--text_key", "id")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert "row 2: 'text' is null" in refused("--input", path)
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"text": bad}), path)
    assert "row 1: 'text' is not UTF-8" in refused("--input", path)


def test_missing_and_empty_places(tmp_path, refused):
    assert "no/such.txt: no such file" in refused("--input", "no/such.txt")
    assert "no file matches this pattern" in refused("--input", tmp_path / "*.txt")
    folder = tmp_path / "folder"
    write(folder / "LICENSE", b"x")
    assert f"input {folder}: no file of an allowed type" in refused("--input", folder)


def test_one_file_twice(tmp_path, refused):
    path = write(tmp_path / "a.txt", b"hello")
    assert "is given twice" in refused("--input", path, tmp_path / "*.txt")
    (tmp_path / "link.txt").symlink_to(path)
    assert "is given twice" in refused("--input", path, "--valid_input", tmp_path / "link.txt")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without rights")
def test_unreadable_file(model_file):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "a.txt", b"secret")
        path.chmod(0)
        os.chmod(folder, 0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(InputError, match=r"a\.txt: cannot be read \(permission denied\)"):
                read(path)
        finally:
            os.seteuid(0)


def test_too_long_document(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 100)
    long = "ö" * 60
    for name, content in (("a.txt", long.encode()), ("a.jsonl", jsonl(["x", long]))):
        error = refused("--input", write(tmp_path / name, content))
        assert "longer than 100 bytes; cut it with --document_start" in error
    path = write(tmp_path / "b.txt", b"start\n" + b"line\n" * 50)
    assert "b.txt:1: the document is longer" in refused(
        "--input", path, "--document_start", "start"
    )


def test_a_too_long_document_is_noticed_while_it_is_joined(monkeypatch):
    """A wrong expression must not collect a whole corpus in memory first."""
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 100)
    lines = iter([("ten chars\n", "a.txt:1")] * 1000)
    with pytest.raises(InputError, match=r"a\.txt:1: the document is longer"):
        list(sources._cut(lines, "^start"))
    assert len(list(lines)) > 980


def test_embedded_source():
    source = embedded_source()
    assert source.size is not None
    assert next(source.documents()).where.startswith("pydoc_data.topics:")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of `save_to_disk` with two splits, and one with a bare dataset."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved")
    train = datasets.Dataset.from_dict({"text": TEXTS, "id": range(4)})
    valid = datasets.Dataset.from_dict({"text": ["held out"], "id": [0]})
    datasets.DatasetDict({"train": train, "validation": valid}).save_to_disk(folder / "dict")
    train.save_to_disk(folder / "bare")
    return folder


def dataset_texts(path: Path, split: str | None, **how: str) -> list[str]:
    source = dataset_source(str(path), None, split, True, Reading(**how))
    return [document.text for document in source.documents()]


def test_saved_datasets(saved):
    assert dataset_texts(saved / "dict", "train") == TEXTS
    assert dataset_texts(saved / "dict", "validation") == ["held out"]
    assert dataset_texts(saved / "bare", "train") == TEXTS
    lines = dataset_texts(saved / "bare", "train", document_start="^😀")
    assert lines == ["first\nof two lines\nzweiter — mit Ümlaut\n\n", "😀 last\n"]


def test_bad_saved_datasets(saved, tmp_path, refused):
    dataset = ["--dataset", saved / "dict"]
    error = refused(*dataset, "--dataset_split", "dev")
    assert "has no split 'dev'; it has: train, validation" in error
    assert "row 1: has no 'content'; --text_key may be" in refused(
        *dataset, "--text_key", "content"
    )
    assert "give it as --dataset" in refused("--input", saved / "dict")
    (tmp_path / "empty").mkdir()
    assert "cannot be loaded" in refused("--dataset", tmp_path / "empty")


def test_a_dataset_that_breaks_in_the_middle(monkeypatch, refused):
    def broken(*arguments, **options):
        yield {"text": "fine"}
        raise ConnectionError("the line is dead\nsecond line")

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", broken)
    error = refused("--dataset", "some/name")
    assert "row 2 cannot be read (ConnectionError: the line is dead); run the same" in error

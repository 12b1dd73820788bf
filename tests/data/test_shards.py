import hashlib
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data import shards
from data.errors import InputError
from data.prepare import main
from data.shards import PreparedData, TokenStream, token_dtype
from data.sources import Document
from tests.data.conftest import make_texts

TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, model_file) -> Path:
    """A folder with three splits; the train split has several shards."""
    folder = tmp_path_factory.mktemp("shards")
    source = folder / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    options = ["--input", source, "--output", folder / "out", "--tokenizer", model_file]
    options += ["--valid_fraction", 0.1, "--test_fraction", 0.1, "--shard_tokens", 1000]
    assert main([str(option) for option in [*options, "--processes", 1]]) == 0
    return folder / "out"


@pytest.fixture
def copy(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "copy")


def edit_manifest(folder: Path, edit) -> None:
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def test_format_read_without_our_code(prepared, model_file):
    """The folder's documented format, with only NumPy, hashlib and SentencePiece."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    assert (prepared / "tokenizer.model").read_bytes() == model_file.read_bytes()
    assert manifest["token_dtype"] == "uint16"
    assert len(manifest["splits"]["train"]["shards"]) > 3
    texts = []
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            for kind in ("tokens", "docs"):
                content = (prepared / shard[f"{kind}_file"]).read_bytes()
                assert shard[f"{kind}_file_bytes"] == len(content)
                assert shard[f"{kind}_sha256"] == hashlib.sha256(content).hexdigest()
            tokens = np.fromfile(prepared / shard["tokens_file"], "<u2")
            docs = np.fromfile(prepared / shard["docs_file"], "<i8").reshape(-1, 3)
            assert (len(tokens), len(docs)) == (shard["tokens"], shard["documents"])
            assert shard["tokens"] <= 1000
            assert shard["max_token_id"] == tokens.max()
            ends = [*docs[1:, 0], len(tokens)]
            for (start, text_bytes, words), end in zip(docs, ends, strict=True):
                assert tokens[start] == oracle.bos_id()
                text = oracle.decode(tokens[start + 1 : end].tolist())
                assert (text_bytes, words) == (len(text.encode()), len(text.split()))
                texts.append(text)
        for key in ("tokens", "documents", "bytes", "words"):
            assert split[key] == sum(shard[key] for shard in split["shards"])
    assert sorted(texts) == sorted(TEXTS)


def test_splits_as_streams(prepared):
    data = PreparedData.open(prepared)
    assert list(data.manifest["splits"]) == ["train", "valid", "test"]
    total = 0
    for name, entry in data.manifest["splits"].items():
        stream = data.split(name)
        assert len(stream) == entry["tokens"]
        assert (stream.documents, stream.text_bytes) == (entry["documents"], entry["bytes"])
        assert stream.words == entry["words"]
        everything = stream.read(0, len(stream))
        assert everything.dtype == np.int64
        starts = stream.document_starts()
        assert starts.dtype == np.int64
        assert np.array_equal(np.flatnonzero(everything == data.tokenizer.bos_id), starts)
        total += stream.documents
    assert total == len(TEXTS)


def test_the_folder_can_be_moved_and_read_only(copy, tmp_path):
    moved = copy.rename(tmp_path / "moved")
    stream = PreparedData.open(moved).split("train")
    assert stream.read(0, 1).tolist() == [1]


@pytest.mark.parametrize("lengths", [[5], [1, 5, 2], [3, 3], [2, 1, 1, 4]])
def test_read_is_a_slice_of_the_concatenation(lengths):
    parts = [np.arange(n, dtype=np.uint16) + 10 * i for i, n in enumerate(lengths)]
    whole = np.concatenate(parts)
    stream = TokenStream(lengths, parts.__getitem__, lambda _: whole, (0, 0, 0))
    for start in range(len(whole) + 1):
        for count in range(len(whole) - start + 1):
            assert stream.read(start, count).tolist() == whole[start : start + count].tolist()


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_read_outside_of_the_stream(start, count):
    stream = TokenStream([10], lambda _: np.arange(10), lambda _: np.arange(3), (0, 0, 0))
    with pytest.raises(ValueError, match=r"not in 0 \.\. 10"):
        stream.read(start, count)


def test_few_shards_are_open_at_once(prepared, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_OPEN_SHARDS", 2)
    stream = PreparedData.open(prepared).split("train")
    whole = stream.read(0, len(stream))
    assert stream._tokens.cache_info().currsize == 2
    assert np.array_equal(stream.read(0, len(stream)), whole)


def test_stream_from_documents_equals_the_prepared_one(prepared, tokenizer):
    stream = PreparedData.open(prepared).split("train")
    starts = [*stream.document_starts(), len(stream)]
    texts = [tokenizer.decode(stream.read(a, b - a)) for a, b in pairwise(starts)]
    mixed = [Document(text, "x") if i % 2 else text for i, text in enumerate(["", *texts, " \n"])]
    memory = TokenStream.from_documents(mixed, tokenizer)
    assert np.array_equal(memory.read(0, len(memory)), stream.read(0, len(stream)))
    assert np.array_equal(memory.document_starts(), stream.document_starts())
    for key in ("documents", "text_bytes", "words"):
        assert getattr(memory, key) == getattr(stream, key)


def test_stream_from_no_documents(tokenizer):
    stream = TokenStream.from_documents([], tokenizer)
    assert (len(stream), stream.documents, len(stream.document_starts())) == (0, 0, 0)


@pytest.mark.parametrize(("vocab", "name"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_dtype_holds_the_vocabulary(vocab, name):
    assert token_dtype(vocab).name == name


def error_of(folder: Path, verify: bool = True) -> str:
    with pytest.raises(InputError) as error:
        PreparedData.open(folder, verify=verify)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_folder_prints_the_command(tmp_path):
    message = error_of(tmp_path / "my data")
    assert "no such folder" in message
    command = "python -m data.prepare --input FILES --vocab_size 32000 --output "
    assert f"{command}'{tmp_path}/my data'" in message
    (tmp_path / "my data").mkdir()
    assert "has no manifest.json; prepare it first" in error_of(tmp_path / "my data")


def test_unfinished_folder(copy):
    (copy / "manifest.json").unlink()
    (copy / "progress.json").write_text("{}")
    assert "was interrupted; run the same" in error_of(copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format_version=2), "format_version is 2; this code reads 1"),
        (lambda m: m.pop("splits"), "'splits' is None, expected a dict"),
        (lambda m: m["tokenizer"].pop("sha256"), "tokenizer: 'sha256' is None"),
        (lambda m: m["tokenizer"].update(vocab_size=99), "vocab_size 99, bos_id 1; the model"),
        (lambda m: m["splits"]["train"].update(shards=[3]), "shards[0]: is not an object"),
        (lambda m: m["splits"]["train"].update(tokens=5), "splits.train: 'tokens' is 5, its"),
        (lambda m: m.update(token_dtype="int8"), "token_dtype is 'int8'; allowed: uint16"),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(max_token_id=420),
            "holds token id 420; the tokenizer's vocab_size is 420",
        ),
        (
            lambda m: m["splits"]["train"]["shards"][0].update(tokens_file="../x"),
            "'../x' is not a plain name",
        ),
        (lambda m: m.update(token_dtype="uint32"), "truncated or changed"),
    ],
)
def test_wrong_manifest(copy, edit, message):
    edit_manifest(copy, edit)
    assert message in error_of(copy, verify=False)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
def test_malformed_manifest(copy, content):
    (copy / "manifest.json").write_bytes(content)
    assert f"{copy / 'manifest.json'}: " in error_of(copy)


@pytest.mark.parametrize("kind", ["tokens", "docs"])
def test_missing_and_truncated_shard(copy, kind):
    file = copy / f"train-00001.{kind}.bin"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-2])
    assert f"{file}: has {size - 2} bytes, expected {size}" in error_of(copy, verify=False)
    file.unlink()
    assert f"{file}: shard is missing" in error_of(copy, verify=False)


@pytest.mark.parametrize("kind", ["tokens", "docs"])
def test_one_flipped_bit(copy, kind):
    file = copy / f"test-00000.{kind}.bin"
    content = bytearray(file.read_bytes())
    expected = hashlib.sha256(content).hexdigest()
    content[5] ^= 1
    file.write_bytes(content)
    found = hashlib.sha256(content).hexdigest()
    assert f"{file}: sha256 is {found}, expected {expected}" in error_of(copy)
    PreparedData.open(copy, verify=False)  # skips just this


def test_wrong_tokenizer(copy):
    file = copy / "tokenizer.model"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    from tests.data.test_tokenizer import write_model

    write_model(file)
    message = error_of(copy, verify=False)
    assert f"{file}: is not the tokenizer of these shards" in message
    assert expected in message
    file.unlink()
    assert f"tokenizer {file}: cannot be read (no such file" in error_of(copy, verify=False)


def test_unknown_split(prepared):
    with pytest.raises(InputError, match="no split 'dev'; it has: train, valid, test"):
        PreparedData.open(prepared).split("dev")

import json
import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from data import prepare
from data.encode import SplitRule
from data.shards import PreparedData
from data.tokenizer import Tokenizer
from tests.data.conftest import make_texts


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name != prepare.LOCK}


def texts_of(folder: Path, split: str) -> list[str]:
    """The texts of a split, cut at the BOS tokens."""
    data = PreparedData.open(folder)
    stream = data.split(split)
    ends = [*stream.document_starts()[1:], len(stream)]
    return [
        data.tokenizer.decode(stream.read(start, end - start))
        for start, end in zip(stream.document_starts(), ends, strict=True)
    ]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Three files, with empty documents in them."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = make_texts(90)
    write_jsonl(folder / "a.jsonl", texts[:40])
    write_jsonl(folder / "b.jsonl", [*texts[40:60], "", *texts[60:80], " \n\t"])
    (folder / "c.txt").write_text(texts[80])
    return folder


def test_every_document_once_in_order(corpus, tmp_path, run_prepare):
    out = tmp_path / "out"
    options = ["--valid_fraction", 0.1, "--test_fraction", 0.1, "--shard_tokens", 2000]
    summary = tmp_path / "summary.json"
    result = run_prepare(
        *["--input", corpus, "--output", out, "--vocab_size", 400, "--processes", 2],
        *[*options, "--summary", summary],
    )
    assert result.code == 0, result
    assert result.err == ""
    expected = make_texts(90)[:81]
    found = {split: texts_of(out, split) for split in ("train", "valid", "test")}
    for texts in found.values():
        assert texts == sorted(texts, key=expected.index)
        assert texts
    assert sorted(chain.from_iterable(found.values())) == sorted(expected)

    manifest = PreparedData.open(out).manifest
    assert manifest["documents_skipped_empty"] == 2
    assert [Path(entry["name"]).name for entry in manifest["inputs"]] == [
        *("a.jsonl", "b.jsonl", "c.txt")
    ]
    assert manifest["created_by"]["options"]["valid_fraction"] == 0.1
    written = json.loads(summary.read_text())
    for split, texts in found.items():
        row = next(line.split() for line in result.out.splitlines() if line.startswith(split))
        entry = manifest["splits"][split]
        assert int(row[1]) == entry["documents"] == len(texts)
        assert int(row[2].replace(",", "")) == entry["tokens"] == written["splits"][split]["tokens"]
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        per_token = entry["bytes"] / entry["tokens"]
        assert written["splits"][split]["bytes_per_token"] == pytest.approx(per_token)
    assert not (out / "progress.json").exists()
    assert not list(out.glob("*.partial"))


def test_processes_do_not_change_a_byte(corpus, tmp_path, run_prepare, monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1500)
    for processes in (1, 3):
        out = tmp_path / f"out{processes}"
        options = ["--input", corpus, "--output", out, "--vocab_size", 400]
        assert run_prepare(*options, "--processes", processes).code == 0
    assert content(tmp_path / "out1") == content(tmp_path / "out3")


def test_tokenizer_is_trained_on_train_documents_only(tmp_path, run_prepare):
    """A word that stands only in held-out documents must not become a piece."""
    rule = SplitRule(seed=0, valid_fraction=0.5, test_fraction=0.0)
    marked = [f"{n} " + "qqqqqqqq " * 300 for n in range(60)]
    held_out = [text for text in marked if rule.split(text) == "valid"]
    path = write_jsonl(tmp_path / "a.jsonl", [*make_texts(120), *held_out])
    options = ["--input", path, "--output", tmp_path / "out", "--vocab_size", 380]
    options += ["--processes", 1, "--test_fraction", 0]
    assert run_prepare(*options, "--valid_fraction", 0.5).code == 0
    tokenizer = PreparedData.open(tmp_path / "out").tokenizer
    assert len(tokenizer.encode("qqqqqqqq")) == 8
    assert run_prepare(*options, "--valid_fraction", 0, "--overwrite").code == 0
    tokenizer = PreparedData.open(tmp_path / "out").tokenizer
    assert len(tokenizer.encode("qqqqqqqq")) < 8


def test_tokenizer_sample_takes_from_every_file(tmp_path, run_prepare):
    """With room for a tenth of the text, a word that stands only in the last file is learned."""
    files = [
        write_jsonl(tmp_path / f"{n}.jsonl", make_texts(40, seed=n, words=120)) for n in range(3)
    ]
    files.append(write_jsonl(tmp_path / "last.jsonl", ["qqqqqqqq " * 80] * 40))
    run_prepare(
        *["--input", *files, "--output", tmp_path / "out", "--vocab_size", 330],
        *["--processes", 1, "--tokenizer_sample_bytes", 10_000],
    )
    tokenizer = Tokenizer(tmp_path / "out" / "tokenizer.model")
    assert len(tokenizer.encode("qqqqqqqq")) < 8


def test_explicit_splits_and_duplicates(tmp_path, run_prepare, model_file):
    texts = make_texts(30)
    paths = [
        write_jsonl(tmp_path / f"{name}.jsonl", part)
        for name, part in (("train", texts[:10]), ("valid", texts[10:20]), ("test", texts[20:]))
    ]
    result = run_prepare(
        *["--input", paths[0], "--valid_input", paths[1], "--test_input", paths[2]],
        *["--output", tmp_path / "out", "--tokenizer", model_file, "--processes", 1],
    )
    assert result.code == 0
    assert texts_of(tmp_path / "out", "train") == texts[:10]
    assert texts_of(tmp_path / "out", "valid") == texts[10:20]
    assert texts_of(tmp_path / "out", "test") == texts[20:]


def test_equal_documents_fall_in_one_split(tmp_path, run_prepare, model_file):
    texts = make_texts(40, words=12)
    write_jsonl(tmp_path / "a.jsonl", texts * 3)
    options = ["--valid_fraction", 0.3, "--test_fraction", 0.3, "--processes", 1]
    options += ["--input", tmp_path / "a.jsonl", "--tokenizer", model_file]
    run_prepare(*options, "--output", tmp_path / "out")
    found = [set(texts_of(tmp_path / "out", split)) for split in ("train", "valid", "test")]
    assert sum(map(len, found)) == len(set().union(*found)) == 40
    run_prepare(*options, "--output", tmp_path / "other", "--split_seed", 1)
    assert set(texts_of(tmp_path / "other", "train")) != found[0]


@pytest.mark.parametrize("limit", [1, 40, 45, 61, 1000])
def test_max_documents_counts_the_input_only(limit, corpus, tmp_path, run_prepare, model_file):
    valid = write_jsonl(tmp_path / "valid.jsonl", make_texts(12, seed=1))
    result = run_prepare(
        *["--input", corpus, "--valid_input", valid, "--test_fraction", 0, "--processes", 1],
        *["--output", tmp_path / "out", "--tokenizer", model_file, "--max_documents", limit],
    )
    assert result.code == 0
    assert len(texts_of(tmp_path / "out", "valid")) == 12
    in_order = [*make_texts(90)[:60], "", *make_texts(90)[60:80], "", make_texts(90)[80]]
    expected = [text for text in in_order[:limit] if text]
    assert texts_of(tmp_path / "out", "train") == expected


def test_dataset_from_disk_with_its_own_splits(tmp_path, run_prepare, model_file):
    """WikiText's shape: rows are lines, and the three splits are given."""
    datasets = pytest.importorskip("datasets")
    lines = ["", " = One = ", "", "body", " = = Part = = ", " = Two = ", "end"]
    splits = {"train": lines, "validation": lines[1:4], "test": lines[5:]}
    saved = tmp_path / "saved"
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": rows}) for name, rows in splits.items()}
    ).save_to_disk(saved)
    result = run_prepare(
        *["--config", "wikitext103", "--dataset", saved, "--output", tmp_path / "out"],
        *["--vocab_size", 290, "--processes", 1],
    )
    assert result.code == 0, result
    train = [" = One = \n\nbody\n = = Part = = \n", " = Two = \nend\n"]
    assert texts_of(tmp_path / "out", "train") == train
    assert texts_of(tmp_path / "out", "valid") == [" = One = \n\nbody\n"]
    assert texts_of(tmp_path / "out", "test") == [" = Two = \nend\n"]
    assert PreparedData.open(tmp_path / "out").manifest["documents_skipped_empty"] == 1


def test_embedded_corpus(tmp_path, run_prepare):
    import platform

    out = tmp_path / "out"
    result = run_prepare(
        *["--config", "embedded", "--output", out, "--max_documents", 60, "--processes", 1],
        *["--vocab_size", 1000],
    )
    assert result.code == 0, result
    manifest = PreparedData.open(out).manifest
    assert manifest["created_by"]["python"] == platform.python_version()
    assert manifest["inputs"][0]["name"].startswith("embedded corpus of Python")
    assert manifest["splits"]["train"]["documents"] > 40


def test_wide_ids(tmp_path, run_prepare, corpus, monkeypatch, model_file):
    """Over 65,536 ids need 4 bytes. The vocabulary is small here, only the border is moved."""
    from data import encode, shards

    def wide(_):
        return shards.np.dtype("<u4")

    monkeypatch.setattr(encode, "token_dtype", wide)
    monkeypatch.setattr(prepare, "token_dtype", wide)
    options = ["--input", corpus, "--tokenizer", model_file, "--processes", 1]
    run_prepare(*options, "--output", tmp_path / "wide")
    monkeypatch.undo()
    run_prepare(*options, "--output", tmp_path / "narrow")
    manifest = PreparedData.open(tmp_path / "wide").manifest
    assert manifest["token_dtype"] == "uint32"
    sizes = [
        (tmp_path / name / "train-00000.tokens.bin").stat().st_size for name in ("wide", "narrow")
    ]
    assert sizes[0] == 2 * sizes[1]
    assert texts_of(tmp_path / "wide", "train") == texts_of(tmp_path / "narrow", "train")


def test_empty_split_is_a_warning(tmp_path, run_prepare, model_file):
    (tmp_path / "a.txt").write_text("one document only")
    options = ["--input", tmp_path / "a.txt", "--tokenizer", model_file]
    result = run_prepare(*options, "--output", tmp_path / "out", "--valid_fraction", 0.01)
    assert result.code == 0
    for line, split in zip(result.err.splitlines(), ("valid", "test"), strict=True):
        assert line.startswith(f"warning: the {split} split is empty: too few documents")
    quiet = run_prepare(
        *[*options, "--output", tmp_path / "quiet", "--valid_fraction", 0, "--test_fraction", 0]
    )
    assert (quiet.code, quiet.err) == (0, "")


def test_no_train_document(tmp_path, refused):
    write_jsonl(tmp_path / "a.jsonl", ["", " ", "\n"])
    assert "the train split of" in refused("--input", tmp_path / "a.jsonl")
    assert "sample is empty" in refused(
        *["--input", tmp_path / "a.jsonl", "--vocab_size", 300], tokenizer=None
    )


def test_vocabulary_too_large_for_the_corpus(tmp_path, refused):
    (tmp_path / "a.txt").write_text("a tiny text")
    error = refused("--input", tmp_path / "a.txt", "--vocab_size", 5000, tokenizer=None)
    assert "vocab_size 5000 is too large" in error
    assert "it allows at most" in error


def test_a_second_run_does_nothing(corpus, tmp_path, run_prepare, model_file):
    out = tmp_path / "out"
    options = ["--input", corpus, "--output", out, "--tokenizer", model_file]
    first = run_prepare(*options, "--processes", 1)
    before = {f: f.stat().st_mtime_ns for f in out.iterdir() if f.name != prepare.LOCK}
    second = run_prepare(*options, "--processes", 2)
    assert (first.code, second.code) == (0, 0)
    assert "already prepared with these options" in second.out
    assert "already prepared" not in first.out
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_a_second_run_with_other_options_or_inputs_is_refused(
    corpus, tmp_path, run_prepare, model_file
):
    out, model = tmp_path / "out", tmp_path / "a.model"
    model.write_bytes(model_file.read_bytes())
    options = ["--input", corpus, "--output", out, "--tokenizer", model, "--processes", 1]
    assert run_prepare(*options).code == 0
    before = content(out)

    def refused_with(*more: object) -> str:
        result = run_prepare(*options, *more)
        assert result.code == 2
        assert "--overwrite" in result.err
        assert content(out) == before
        return result.err

    assert "prepared with split_seed 0, now it is 5" in refused_with("--split_seed", 5)
    os.utime(corpus / "c.txt", (1, 1))
    assert f"input {corpus / 'c.txt'} changed" in refused_with()
    (corpus / "c.txt").unlink()
    assert f"input {corpus}" in refused_with()
    (corpus / "c.txt").write_text("longer text than before")
    from tests.data.test_tokenizer import write_model

    write_model(model)
    assert "tokenizer's file changed" in refused_with()
    assert run_prepare(*options, "--overwrite").code == 0
    assert content(out)["tokenizer.model"] == model.read_bytes()


def test_foreign_files_are_never_touched(corpus, tmp_path, run_prepare, model_file, refused):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for more in ([], ["--overwrite"]):
        error = refused("--input", corpus, *more)
        assert "holds other files (thesis.tex); choose an empty or new folder" in error
    (out / "thesis.tex").unlink()
    options = ["--input", corpus, "--output", out, "--tokenizer", model_file, "--processes", 1]
    assert run_prepare(*options, "--shard_tokens", 1000).code == 0
    (out / "notes.txt").write_text("mine")
    assert run_prepare(*options, "--overwrite").code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert len(list(out.glob("train-*"))) == 2  # none of the many small shards is left


def test_output_is_a_file(corpus, tmp_path, refused):
    (tmp_path / "out").write_text("x")
    assert f"file exists: {tmp_path / 'out'}" in refused("--input", corpus)


def test_damaged_progress(corpus, tmp_path, refused):
    (tmp_path / "out").mkdir()
    for damage in ("{", "[]", "{}"):
        (tmp_path / "out" / "progress.json").write_text(damage)
        assert "progress.json: is damaged" in refused("--input", corpus)


def test_imports_stay_light():
    """Workers import this module; each second would be paid once a process."""
    script = "import sys, data.prepare; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    heavy = {"torch", "datasets", "pyarrow", "jsonargparse", "pandas", "transformers"}
    assert not heavy & set(modules.split())

"""Text -> a folder of token shards.

    python -m data.prepare --input PATH... --output DIR --vocab_size N

The steps: list the sources, train or copy the tokenizer, tokenise document by document, write the
manifest. The same command run again after an interruption goes on where it stopped. docs/data.md
has the format and the guarantees.
"""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from data.encode import Batch, EncodedBatch, SplitRule, encode_in_order
from data.errors import InputError, require_folder_of, run_cli
from data.prepare_config import PrepareConfig, parse_config
from data.shard_writer import KINDS, PARTIAL, Position, ShardWriter, write_json
from data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    PROGRESS,
    SPLITS,
    TOKENIZER,
    PreparedData,
    token_dtype,
)
from data.sources import (
    Document,
    Reading,
    Source,
    dataset_source,
    embedded_source,
    file_sources,
)
from data.tokenizer import Tokenizer, train_tokenizer

COMMIT_TOKENS = 2**24
BATCH_CHARACTERS = 2**20
BATCH_DOCUMENTS = 4096
LOCK = ".prepare.lock"


@dataclass
class PlannedSource:
    """A source and its split; None: the split rule decides for each document."""

    source: Source
    split: str | None


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a folder as the command line says; returns the exit code."""
    started = time.monotonic()
    config = parse_config(sys.argv[1:] if argv is None else argv)
    require_folder_of(config.summary, "--summary")
    plan = _plan(config)
    identity = _identity(config, plan)
    folder = Path(config.output)  # type: ignore[arg-type]  # parse_config requires it
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _refuse_foreign(folder)
        if config.overwrite:
            _remove_prepared(folder)
        if _is_finished(folder, identity):
            print(f"{folder}: already prepared with these options; nothing to do")
        else:
            _prepare(config, plan, identity, folder)
    _report(folder, config, time.monotonic() - started)
    return 0


def _plan(config: PrepareConfig) -> list[PlannedSource]:
    """All sources, in the order in which they are read."""
    how = Reading(config.text_key, config.document_start)
    files = {None: config.input, "valid": config.valid_input, "test": config.test_input}
    dataset_splits = {
        None: config.dataset_split,
        "valid": config.dataset_valid_split,
        "test": config.dataset_test_split,
    }
    plan = []
    for split, paths in files.items():
        sources = file_sources(paths, how)
        name, dataset_split = config.dataset, dataset_splits[split]
        if name is not None and dataset_split is not None:
            options = (config.dataset_config, dataset_split, config.dataset_streaming)
            sources.append(dataset_source(name, *options, how))
        if split is None and config.embedded:
            sources.append(embedded_source())
        plan += [PlannedSource(source, split) for source in sources]
    _refuse_repeats(plan)
    return plan


def _refuse_repeats(plan: list[PlannedSource]) -> None:
    """A file given twice is a mistake, and one in two splits would spoil the evaluation."""
    seen: dict[str, str] = {}
    for planned in plan:
        name = planned.source.name
        key = os.path.realpath(name) if os.path.exists(name) else name
        if key in seen:
            raise InputError(f"{name}: is given twice (as {seen[key]}); allowed is once")
        seen[key] = name


def _identity(config: PrepareConfig, plan: list[PlannedSource]) -> dict[str, Any]:
    """What decides the content of the folder, and tells a rerun from a different preparation."""
    given = None if config.tokenizer is None else Tokenizer(config.tokenizer).sha256
    inputs = [
        {
            "name": planned.source.name,
            "bytes": planned.source.size,
            "mtime_ns": planned.source.mtime_ns,
        }
        for planned in plan
    ]
    return {"options": config.recorded(), "tokenizer_sha256": given, "inputs": inputs}


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    try:
        with FileLock(folder / LOCK, timeout=0):
            yield
    except Timeout as error:
        raise InputError(
            f"output {folder}: another prepare is writing there; wait for it or choose another "
            "folder"
        ) from error


def _prepared_files(folder: Path) -> list[Path]:
    """What a preparation may have left.

    The manifest comes last: removed in this order, the folder is known as ours to the end.
    """
    files: list[Path] = []
    for split in SPLITS:
        for kind in KINDS:
            files += sorted(folder.glob(f"{split}-[0-9]*.{kind}.bin"))
            files += sorted(folder.glob(f"{split}-[0-9]*.{kind}.bin{PARTIAL}"))
    names = [TOKENIZER, PROGRESS, MANIFEST]
    files += [folder / (name + end) for name in names for end in (".tmp", "")]
    return [file for file in files if file.exists()]


def _remove_prepared(folder: Path) -> None:
    for file in _prepared_files(folder):
        file.unlink()


def _refuse_foreign(folder: Path) -> None:
    """InputError where the folder is not a preparation's and not empty either."""
    if (folder / MANIFEST).exists() or (folder / PROGRESS).exists():
        return
    ours = {LOCK, PROGRESS + ".tmp"}  # a kill in the first moment leaves them
    foreign = sorted({file.name for file in folder.iterdir()} - ours)
    if foreign:
        raise InputError(
            f"output {folder}: holds other files ({foreign[0]}); choose an empty or new folder"
        )


def _is_finished(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether `identity` is complete here. InputError where the folder holds something else."""
    if (folder / MANIFEST).exists():
        manifest = PreparedData.open(folder, verify=False).manifest
        _refuse_difference(folder, _manifest_identity(manifest), identity)
        (folder / PROGRESS).unlink(missing_ok=True)  # a kill came between the two
        return True
    if (folder / PROGRESS).exists():
        progress = _read_progress(folder)
        if "position" in progress:
            _refuse_difference(folder, progress["identity"], identity)
        elif progress["identity"] != identity:  # stopped before any token: nothing worth keeping
            _remove_prepared(folder)
    return False


def _manifest_identity(manifest: dict[str, Any]) -> dict[str, Any]:
    options = manifest["created_by"].get("options", {})
    given = manifest["tokenizer"]["sha256"] if options.get("tokenizer") else None
    return {"options": options, "tokenizer_sha256": given, "inputs": manifest["inputs"]}


def _read_progress(folder: Path) -> dict[str, Any]:
    try:
        progress = json.loads((folder / PROGRESS).read_bytes())
        progress["identity"]["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / PROGRESS}: is damaged ({error!r}); begin anew with --overwrite"
        ) from error
    return progress


def _refuse_difference(folder: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    if there == now:
        return
    advice = "choose another --output, or begin anew with --overwrite"
    old, new = there["options"], now["options"]
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise InputError(
                f"output {folder}: was prepared with {key} {old.get(key)!r}, now it is "
                f"{new.get(key)!r}; {advice}"
            )
    if there["tokenizer_sha256"] != now["tokenizer_sha256"]:
        raise InputError(f"output {folder}: the tokenizer's file changed since; {advice}")
    before = {entry["name"]: entry for entry in there["inputs"]}
    changed = [entry for entry in now["inputs"] if before.get(entry["name"]) != entry]
    name = changed[0]["name"] if changed else sorted(before)[0]
    raise InputError(f"output {folder}: input {name} changed since it was prepared; {advice}")


def _prepare(
    config: PrepareConfig, plan: list[PlannedSource], identity: dict[str, Any], folder: Path
) -> None:
    fractions = (config.valid_fraction, config.test_fraction)
    rule = SplitRule(config.split_seed, *fractions)  # type: ignore[arg-type]  # resolved
    resuming = (folder / PROGRESS).exists()
    progress = _read_progress(folder) if resuming else None
    if progress is None:
        write_json(folder / PROGRESS, {"identity": identity})  # the folder is ours from now on
    tokenizer = _make_tokenizer(config, plan, rule, folder)
    dtype = token_dtype(tokenizer.vocab_size)
    writer = ShardWriter(folder, identity, config.shard_tokens, dtype)
    if progress is not None and "position" in progress:
        writer.resume(progress)
        print(f"{folder}: going on after {_consumed(writer.position)}", file=sys.stderr)
    _write_shards(config, plan, rule, writer)
    _finish(writer, tokenizer, folder)


def _consumed(position: Position) -> str:
    return f"{position.source} sources and {position.documents_of_source} documents of the next"


def _make_tokenizer(
    config: PrepareConfig, plan: list[PlannedSource], rule: SplitRule, folder: Path
) -> Tokenizer:
    """The folder's tokenizer: there from an interrupted run, copied, or trained."""
    path = folder / TOKENIZER
    if not path.exists():
        if config.tokenizer is not None:
            aside = path.with_name(TOKENIZER + ".tmp")
            shutil.copyfile(config.tokenizer, aside)
            os.replace(aside, path)
        else:
            assert config.vocab_size is not None
            texts = _training_texts(config, plan, rule)
            sample = config.tokenizer_sample_bytes
            train_tokenizer(texts, path, config.vocab_size, sample_bytes=sample)
    return Tokenizer(path)


def _training_texts(
    config: PrepareConfig, plan: list[PlannedSource], rule: SplitRule
) -> Iterator[str]:
    """Train-split texts of every source in proportion to its size (equal parts if unknown)."""
    mixed = [index for index, planned in enumerate(plan) if planned.split is None]
    sizes = [plan[index].source.size or 0 for index in mixed]
    if not all(sizes):
        sizes = [1] * len(mixed)
    position = Position()
    for index, size in zip(mixed, sizes, strict=True):
        left = config.tokenizer_sample_bytes * size / sum(sizes)
        for document in _documents(plan[index], position, config.max_documents):
            position.input_documents += 1
            if document.text.strip() and rule.split(document.text) == "train":
                yield document.text
                left -= len(document.text.encode())
            if left <= 0:
                break


def _documents(
    planned: PlannedSource, position: Position, max_documents: int | None
) -> Iterator[Document]:
    """Documents of a source behind those that `position` says are consumed of it."""
    left = None
    if planned.split is None and max_documents is not None:
        left = max(0, max_documents - position.input_documents)
        if left == 0:
            return iter(())  # never opens what will not be read
    skip = position.documents_of_source
    stop = None if left is None else skip + left
    return islice(planned.source.documents(), skip, stop)


def _batches(
    plan: list[PlannedSource], start: Position, max_documents: int | None
) -> Iterator[Batch]:
    position = Position(start.source, start.documents_of_source, 0, start.input_documents)
    while position.source < len(plan):
        planned, index = plan[position.source], position.source
        texts: list[str] = []
        characters = 0
        count = 0
        for document in _documents(planned, position, max_documents):
            texts.append(document.text)
            characters += len(document.text)
            count += 1
            if characters >= BATCH_CHARACTERS or len(texts) >= BATCH_DOCUMENTS:
                yield Batch(texts, planned.split, index, ends_source=False)
                texts, characters = [], 0
        yield Batch(texts, planned.split, index, ends_source=True)
        position.input_documents += count if planned.split is None else 0
        position.source, position.documents_of_source = index + 1, 0


def _write_shards(
    config: PrepareConfig, plan: list[PlannedSource], rule: SplitRule, writer: ShardWriter
) -> None:
    from tqdm import tqdm

    batches = _batches(plan, writer.position, config.max_documents)
    assert config.processes is not None
    encoded = encode_in_order(batches, writer.folder / TOKENIZER, rule, config.processes)
    # disable=None: no bar where stderr is not a terminal
    with tqdm(unit="B", unit_scale=True, desc="tokenise", disable=None) as bar:
        for batch in encoded:
            _write_batch(batch, writer, is_input=plan[batch.source].split is None)
            if writer.uncommitted_tokens >= COMMIT_TOKENS:
                writer.commit()
            bar.update(sum(batch.bytes))
    writer.finish()


def _write_batch(batch: EncodedBatch, writer: ShardWriter, is_input: bool) -> None:
    position = writer.position
    offset = 0
    documents = zip(batch.splits, batch.lengths, batch.bytes, batch.words, strict=True)
    for split, length, text_bytes, words in documents:
        if length:
            writer.add(split, batch.tokens[offset : offset + length], text_bytes, words)
        else:
            position.skipped_empty += 1
        offset += length
        # Counted only now: adding may have committed a full shard, which does not hold this one.
        position.documents_of_source += 1
        position.input_documents += is_input
    if batch.ends_source:
        position.source += 1
        position.documents_of_source = 0


def _finish(writer: ShardWriter, tokenizer: Tokenizer, folder: Path) -> None:
    splits = {name: writer.splits[name].shards for name in SPLITS if name in writer.splits}
    if "train" not in splits:
        raise InputError(
            f"the train split of {folder} has no document: the input has too few, or only empty "
            "ones; give more text, or cut it with --document_start"
        )
    write_json(folder / MANIFEST, _manifest(writer, tokenizer, splits))
    (folder / PROGRESS).unlink()


def _manifest(
    writer: ShardWriter, tokenizer: Tokenizer, splits: dict[str, list[dict]]
) -> dict[str, Any]:
    counts = ("tokens", "documents", "bytes", "words")
    options = writer.identity["options"]
    return {
        "format_version": FORMAT_VERSION,
        "created_by": {
            "module": "data.prepare",
            "options": options,
            # only the embedded corpus depends on it
            "python": platform.python_version() if options["embedded"] else None,
        },
        "tokenizer": {
            "file": TOKENIZER,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
        },
        "token_dtype": writer.dtype.name,
        "splits": {
            name: {**{key: sum(s[key] for s in shards) for key in counts}, "shards": shards}
            for name, shards in splits.items()
        },
        "inputs": writer.identity["inputs"],
        "documents_skipped_empty": writer.position.skipped_empty,
    }


def _report(folder: Path, config: PrepareConfig, seconds: float) -> None:
    """Print the table, warn of empty splits, write the summary."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    splits = {name: _summary(split) for name, split in manifest["splits"].items()}
    columns = ("documents", "tokens", "text_bytes", "bytes_per_token", "shards")
    print("split " + "".join(f"{column:>17}" for column in columns))
    for name, split in splits.items():
        cells = (f"{split[c]:,.3f}" if c == "bytes_per_token" else f"{split[c]:,}" for c in columns)
        print(f"{name:<6}" + "".join(f"{cell:>17}" for cell in cells))
    print(
        f"{manifest['documents_skipped_empty']} empty documents skipped, {seconds:.1f} s: {folder}"
    )
    for name in SPLITS:
        if getattr(config, f"{name}_fraction", 0) and name not in splits:
            print(
                f"warning: the {name} split is empty: too few documents for --{name}_fraction "
                f"{getattr(config, f'{name}_fraction')}; cut the text with --document_start or "
                f"give --{name}_input",
                file=sys.stderr,
            )
    if config.summary is not None:
        summary = {"output": str(folder), "splits": splits, "seconds": seconds}
        summary["documents_skipped_empty"] = manifest["documents_skipped_empty"]
        write_json(Path(config.summary), summary)


def _summary(split: dict[str, Any]) -> dict[str, Any]:
    return {
        "documents": split["documents"],
        "tokens": split["tokens"],
        "text_bytes": split["bytes"],
        "words": split["words"],
        "bytes_per_token": split["bytes"] / split["tokens"],
        "shards": len(split["shards"]),
    }


if __name__ == "__main__":
    run_cli(main)

"""The options of `python -m data.prepare`: defaults, then a YAML file, then the command line."""

import dataclasses
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import InputError

CONFIG_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "data"
DEFAULT_FRACTION = 0.01
# They change how a folder is prepared, never what is in it: a rerun may change them.
RUNTIME_OPTIONS = ("output", "processes", "overwrite", "summary")


@dataclass
class PrepareConfig:
    """Options of preparation. The docstring under each field is its --help."""

    input: list[str] = field(default_factory=list)
    """Text, JSON-lines and Parquet files (.gz, .bz2, .xz, .zst too), folders, or glob patterns."""

    output: str | None = None
    """Folder to write. Required."""

    tokenizer: str | None = None
    """SentencePiece model to use. Either this or vocab_size."""

    vocab_size: int | None = None
    """Train a SentencePiece tokenizer of this many pieces on the train split's documents."""

    tokenizer_sample_bytes: int = 100_000_000
    """Bytes of text to train the tokenizer on, spread over the sources by their size."""

    embedded: bool = False
    """Use the embedded corpus: the running Python's own documentation and source text."""

    dataset: str | None = None
    """Hugging Face dataset: a name on the hub, or a folder written by save_to_disk."""

    dataset_config: str | None = None
    """Configuration of the dataset, such as wikitext-103-raw-v1."""

    dataset_split: str = "train"
    """Split of the dataset to read as input."""

    dataset_valid_split: str | None = None
    """Split of the dataset that is the valid split."""

    dataset_test_split: str | None = None
    """Split of the dataset that is the test split."""

    dataset_streaming: bool = True
    """Read a hub dataset while it downloads; false downloads it to the local cache first."""

    text_key: str = "text"
    """Field of a JSON line, or column of Parquet and datasets, that holds the text."""

    document_start: str | None = None
    """Regular expression: a line (or row) that matches begins a new document. Unset: a text file
    is one document and so is a row."""

    valid_input: list[str] = field(default_factory=list)
    """Files of the valid split, taken whole."""

    test_input: list[str] = field(default_factory=list)
    """Files of the test split, taken whole."""

    valid_fraction: float | None = None
    """Share of the input's documents that go to the valid split. Unset: 0.01, or 0 where the
    valid split is given."""

    test_fraction: float | None = None
    """Share of the input's documents that go to the test split. Unset: 0.01, or 0 where the test
    split is given."""

    split_seed: int = 0
    """Seed of the hash that assigns documents to splits."""

    max_documents: int | None = None
    """Stop reading the input after this many documents; given valid and test splits are whole."""

    shard_tokens: int = 2**26
    """Tokens a shard holds at most, unless one document is longer."""

    processes: int | None = None
    """Processes that tokenise. Unset: one for each CPU. The result does not depend on it."""

    overwrite: bool = False
    """Remove what an earlier preparation left in the output folder and begin anew."""

    summary: str | None = None
    """Write the final table to this file as JSON."""

    def recorded(self) -> dict[str, Any]:
        """The options that determine the folder's content, as the manifest keeps them."""
        options = dataclasses.asdict(self)
        return {key: value for key, value in options.items() if key not in RUNTIME_OPTIONS}


def parse_config(argv: Sequence[str]) -> PrepareConfig:
    """Options from the command line and its --config file, checked; InputError if wrong."""
    # Slow to import, and the tokenising processes import this module too.
    from data.command_line import parse_options

    config, _ = parse_options(
        PrepareConfig,
        argv,
        prog="python -m data.prepare",
        description="Turn text into a folder of token shards that training and evaluation read.",
        config_folder=CONFIG_FOLDER,
    )
    _resolve(config)
    return config


def _resolve(config: PrepareConfig) -> None:
    """Check the values and put numbers in place of the unset fractions and processes."""
    _check_choices(config)
    for name in ("valid", "test"):
        _resolve_fraction(config, name)
    if config.valid_fraction + config.test_fraction >= 1:  # type: ignore[operator]
        raise InputError("valid_fraction and test_fraction sum up to 1 or more; allowed is below 1")
    if config.processes is None:
        config.processes = len(os.sched_getaffinity(0))
    minima = {"processes": 1, "shard_tokens": 1, "tokenizer_sample_bytes": 1, "max_documents": 1}
    for key, minimum in {**minima, "vocab_size": 1, "split_seed": 0}.items():
        value = getattr(config, key)
        if value is not None and value < minimum:
            raise InputError(f"{key} is {value}; allowed is {minimum} or more")
    try:
        re.compile(config.document_start or "")
    except re.error as error:
        raise InputError(
            f"document_start '{config.document_start}': is not a regular expression ({error})"
        ) from error


def _check_choices(config: PrepareConfig) -> None:
    if not config.text_key:
        raise InputError("text_key is empty; allowed is the name of a field or column")
    if not config.output:
        raise InputError("output is not set; give the folder to write with --output DIR")
    if not (config.input or config.dataset or config.embedded):
        raise InputError("no input; give at least one of --input PATH, --dataset NAME, --embedded")
    if (config.tokenizer is None) == (config.vocab_size is None):
        found = "neither" if config.tokenizer is None else "both"
        raise InputError(
            f"{found} of tokenizer and vocab_size given; give --tokenizer FILE to use a model, "
            "or --vocab_size N to train one"
        )
    if config.dataset is None:
        for name in ("dataset_config", "dataset_valid_split", "dataset_test_split"):
            if getattr(config, name) is not None:
                raise InputError(f"{name} has no effect without --dataset NAME")


def _resolve_fraction(config: PrepareConfig, split: str) -> None:
    key = f"{split}_fraction"
    given = bool(getattr(config, f"{split}_input") or getattr(config, f"dataset_{split}_split"))
    value = getattr(config, key)
    if value is None:
        value = 0.0 if given else DEFAULT_FRACTION
    if not 0 <= value < 1:
        raise InputError(f"{key} is {value}; allowed is 0 or more and below 1")
    if value and given:
        raise InputError(
            f"{key} is {value} and the {split} split is given as well; allowed is one of them"
        )
    setattr(config, key, value)

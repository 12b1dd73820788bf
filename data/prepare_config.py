"""The options of `python -m data.prepare`: defaults, then a YAML file, then the command line."""

import dataclasses
import difflib
import inspect
import os
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.errors import InputError

CONFIG_FOLDER = Path("configs/data")
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
    from jsonargparse import ArgumentError

    parser = _parser()
    config_file, rest = _take_config(list(argv))
    try:
        if config_file is not None:
            parser.set_defaults(_read_yaml(config_file))
        options = vars(parser.parse_args(rest))
    except ArgumentError as error:
        raise InputError(_explain(str(error))) from None
    options.pop("config", None)
    config = PrepareConfig(**options)
    _resolve(config)
    return config


def _parser() -> Any:
    # Slow to import, and the tokenising processes import this module too.
    from jsonargparse import ActionYesNo, ArgumentParser

    parser = ArgumentParser(
        prog="python -m data.prepare",
        description="Turn text into a folder of token shards that training and evaluation read.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=str | None,
        help="YAML file of the options below, or a name in configs/data",
    )
    hints, docs = typing.get_type_hints(PrepareConfig), _field_docs(PrepareConfig)
    for option in dataclasses.fields(PrepareConfig):
        kind: Any = hints[option.name]
        how: dict[str, Any] = {"type": kind, "default": option.default}
        if kind is bool:
            how = {"action": ActionYesNo, "nargs": "?", "default": option.default}
        elif kind == list[str]:
            how = {"type": str, "nargs": "+", "default": []}
        parser.add_argument(f"--{option.name}", help=docs[option.name], **how)
    return parser


def _field_docs(cls: type) -> dict[str, str]:
    """The string under each field. Python drops it at run time, so it is read from the source."""
    found = re.findall(r'^    (\w+): [^\n]*\n    """(.*?)"""', inspect.getsource(cls), re.M | re.S)
    return {name: " ".join(text.split()) for name, text in found}


def _take_config(argv: list[str]) -> tuple[Path | None, list[str]]:
    """Take --config out: wherever it stands, the file's values lie below the command line's."""
    for index, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name != "--config":
            continue
        rest = argv[:index] + argv[index + 1 :]
        if not equals:
            if index + 1 == len(argv):
                raise InputError("option --config: a YAML file is missing after it")
            value = rest.pop(index)
        return _find_config(value), rest
    return None, argv


def _find_config(value: str) -> Path:
    candidates = [Path(value), CONFIG_FOLDER / value, CONFIG_FOLDER / f"{value}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    there = ", ".join(sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml")))
    raise InputError(f"config {value}: no such file; the names in {CONFIG_FOLDER} are: {there}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise InputError(f"config {path}: is not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"config {path}: is not a mapping; allowed is `option: value` lines")
    types = typing.get_type_hints(PrepareConfig)
    for key, value in values.items():
        if key not in types:
            raise InputError(f"config {path}: unknown option '{key}'; {_nearest(str(key))}")
        if types[key] == list[str] and isinstance(value, str):
            values[key] = [value]
        elif not _fits(value, types[key]):
            raise InputError(f"config {path}: {key} is {value!r}; allowed is {_allowed(key)}")
    return values


def _fits(value: Any, kind: Any) -> bool:
    """Whether a YAML value has the type of an option. true is no integer, but 1 is a number."""
    if kind == list[str]:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    allowed = typing.get_args(kind) or (kind,)
    return isinstance(value, (*allowed, int) if float in allowed else allowed)


def _nearest(name: str) -> str:
    names = [option.name for option in dataclasses.fields(PrepareConfig)]
    close = difflib.get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0)
    return f"the nearest is '{close[0]}' (--help lists all)"


def _explain(message: str) -> str:
    """One line for what jsonargparse says in several."""
    if found := re.match(r"unrecognized arguments: (?:--(?P<option>[\w-]+))?(?P<rest>.*)", message):
        if found["option"]:
            return (
                f"command line: unknown option '--{found['option']}'; {_nearest(found['option'])}"
            )
        return f"command line: unexpected argument '{found['rest'].strip()}'; options begin with --"
    if found := re.search(r'Parser key "(\w+)".*?(?:Given|Got) value: ([^\n]*)', message, re.S):
        name, value = found[1], found[2]
        return f"command line: {name} is '{value}'; allowed is {_allowed(name)}"
    if (found := re.search(r'Parser key "(\w+)":(.*)', message, re.S)) and found[1] != "config":
        problem = " ".join(found[2].split())
        return f"command line: {found[1]}: {problem}; allowed is {_allowed(found[1])}"
    return f"command line: {' '.join(message.split())}"


def _allowed(name: str) -> str:
    kind = typing.get_type_hints(PrepareConfig)[name]
    return {
        int: "an integer",
        bool: "true or false",
        str: "text",
        list[str]: "a list of paths",
    }.get(kind) or " or ".join(
        {int: "an integer", float: "a number", str: "text"}.get(part, "null")
        for part in typing.get_args(kind)
    )


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

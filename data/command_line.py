"""Commands configured by a typed dataclass: defaults, then --config FILE.yaml, then options."""

import dataclasses
import difflib
import itertools
import json
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from data.errors import InputError

T = TypeVar("T")

set_parsing_settings(
    docstring_parse_attribute_docstrings=True
)  # a string under a field is its help


def parse_options(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str,
    config_folder: Path | None = None,
    add_options: Callable[[ArgumentParser], None] | None = None,
) -> tuple[T, Namespace]:
    """Parses a command line into `cls`, a dataclass whose docstring describes each field.

    `--config` takes the path of a YAML file, or the name of a file in `config_folder`. Options
    added by `add_options` come back in the namespace. InputError on anything that does not fit:
    a missing file, a key that is not there (the nearest one is named), a wrong type, or a
    ValueError that `cls` raises about its values.
    """
    parser = ArgumentParser(
        prog=prog, description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", action="config", help="a YAML file with the keys below")
    if add_options is not None:
        add_options(parser)
    parser.add_class_arguments(cls)
    argv = _config_first(_split(sys.argv[1:] if argv is None else argv))
    argv = _spell_out([_local_path(a, config_folder) for a in argv], cls)
    for flag, value in itertools.pairwise(argv):
        if flag == "--config":
            _check_file(Path(value), cls)
    try:
        options = parser.parse_args(argv)
        fields = parser.instantiate(options)
        return cls(**{f.name: fields[f.name] for f in _fields(cls)}), options
    except ArgumentError as error:
        raise InputError(_explain(str(error), cls)) from None
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from None


def _split(argv: Sequence[str]) -> list[str]:
    """`--config=x` as `--config x`, so that there is one form to look for."""
    parts: list[str] = []
    for arg in argv:
        parts.extend(arg.split("=", 1) if arg.startswith("--config=") else [arg])
    return parts


def _config_first(argv: list[str]) -> list[str]:
    """The same options with --config in front: whatever their order, options overrule the file."""
    files = [i for i, arg in enumerate(argv) if arg == "--config"]
    taken = {j for i in files for j in (i, i + 1)}
    front = [arg for i in files for arg in argv[i : i + 2]]
    return front + [arg for i, arg in enumerate(argv) if i not in taken]


def _spell_out(argv: list[str], cls: type) -> list[str]:
    """`--input a b` as `--input '["a", "b"]'` for lists, and `--flag` as `--flag true`."""
    kinds = {f"--{f.name}": f.type for f in _fields(cls)}
    parts: list[str] = []
    for flag, is_flag in [(a, a.startswith("--")) for a in argv]:
        owner = parts[-2] if len(parts) > 1 else ""
        if is_flag and parts and kinds.get(parts[-1]) is bool:
            parts.append("true")
        if not is_flag and parts and kinds.get(parts[-1]) == list[str] and flag[:1] != "[":
            flag = json.dumps([flag])
        elif not is_flag and kinds.get(owner) == list[str]:
            parts[-1] = json.dumps([*json.loads(parts[-1]), flag])
            continue
        parts.append(flag)
    return [*parts, "true"] if parts and kinds.get(parts[-1]) is bool else parts


def _local_path(arg: str, folder: Path | None) -> str:
    """The file of that name in the configuration folder, where there is none in the working one."""
    if folder is None or not arg.endswith((".yaml", ".yml")) or Path(arg).exists():
        return arg
    return str(folder / arg) if (folder / arg).exists() else arg


def _check_file(path: Path, cls: type) -> None:
    """InputError where the YAML file cannot be read or has a key that `cls` lacks."""
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: a mapping of keys is expected, found {type(loaded).__name__}")
    _check_keys(loaded, cls, "", path, cls)


def _check_keys(loaded: dict[str, Any], cls: type, prefix: str, path: Path, root: type) -> None:
    types = {f.name: _dataclass_in(f.type) for f in _fields(cls)}
    for key, value in loaded.items():
        if key not in types:
            raise InputError(
                f"{path}: unknown key {prefix}{key}; {_nearest(prefix + str(key), root)}"
            )
        nested = types[key]
        if isinstance(value, dict) and nested is not None:
            _check_keys(value, nested, f"{prefix}{key}.", path, root)


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    hints = typing.get_type_hints(cls)
    fields = list(dataclasses.fields(cls))
    for field in fields:
        field.type = hints[field.name]
    return fields


def _dataclass_in(annotation: Any) -> type | None:
    """The dataclass that a type hint is or, in a union, holds."""
    candidates = (annotation, *typing.get_args(annotation))
    return next(
        (c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None
    )


def _keys(cls: type, prefix: str = "") -> Iterator[str]:
    for field in _fields(cls):
        yield prefix + field.name
        nested = _dataclass_in(field.type)
        if nested is not None:
            yield from _keys(nested, f"{prefix}{field.name}.")


def _nearest(key: str, cls: type) -> str:
    """What an unknown key may have meant: in its own block by name or initials, else elsewhere."""
    known = list(_keys(cls))
    block, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == block]
    leaves = {k.rpartition(".")[2]: k for k in siblings}
    by_name = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    by_initials = [k for n, k in leaves.items() if "".join(w[:1] for w in n.split("_")) == leaf]
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]
    match = by_name or by_initials or elsewhere or difflib.get_close_matches(key, known, 1, 0.75)
    if match:
        return f"did you mean {match[0]}?"
    return f"allowed are {', '.join(siblings or known)}"


def _explain(message: str, cls: type) -> str:
    """jsonargparse's message on one line, with the nearest key where one is unknown."""
    message = " ".join(message.split())
    marker = "unrecognized arguments: "
    if marker in message:
        unknown = message.split(marker)[1].split()[0]
        key = unknown.lstrip("-").split("=")[0]
        return f"unknown option {unknown}; {_nearest(key, cls)}"
    return message.replace('Parser key "', '"')

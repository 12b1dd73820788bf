"""Commands configured by a typed dataclass: defaults, then --config FILE.yaml, then options."""

import dataclasses
import difflib
import json
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from data.errors import InputError

T = TypeVar("T")

# A string under a field is its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


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
    files, rest = _take_configs(list(sys.argv[1:] if argv is None else argv))
    paths = [_find_config(file, config_folder) for file in files]
    spelled = [part for path in paths for part in _check_file(path, cls, rest)]
    # In front, so that options overrule the file wherever it stands.
    argv = [part for path in paths for part in ("--config", str(path))] + _spell_out(
        spelled + rest, cls
    )
    try:
        options = parser.parse_args(argv)
        fields = parser.instantiate(options)
        return cls(**{f.name: fields[f.name] for f in _fields(cls)}), options
    except ArgumentError as error:
        raise InputError(_explain(str(error), cls, paths, rest)) from None
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from None


def _take_configs(argv: list[str]) -> tuple[list[str], list[str]]:
    """The values of --config, and the other options."""
    files: list[str] = []
    rest: list[str] = []
    parts = iter(argv)
    for part in parts:
        name, equals, value = part.partition("=")
        if name != "--config":
            rest.append(part)
            continue
        found = value if equals else next(parts, "")
        if not found:
            raise InputError("--config: the YAML file after it is missing")
        files.append(found)
    return files, rest


def _spell_out(argv: list[str], cls: type) -> list[str]:
    """`--input a b` as `--input '["a", "b"]'` for lists, and `--flag` as `--flag true`."""
    kinds = {f"--{f.name}": f.type for f in _fields(cls)}
    lists = {n for n, kind in kinds.items() if list[str] in (kind, *typing.get_args(kind))}
    parts: list[str] = []
    for flag, is_flag in [(a, a.startswith("--")) for a in argv]:
        owner = parts[-2] if len(parts) > 1 else ""
        if is_flag and parts and kinds.get(parts[-1]) is bool:
            parts.append("true")
        if not is_flag and parts and parts[-1] in lists and flag[:1] != "[":
            flag = json.dumps([flag])
        elif not is_flag and owner in lists:
            parts[-1] = json.dumps([*json.loads(parts[-1]), flag])
            continue
        parts.append(flag)
    return [*parts, "true"] if parts and kinds.get(parts[-1]) is bool else parts


def _find_config(value: str, folder: Path | None) -> Path:
    """A path as it is, or the file of that name, with or without its ending, in the folder."""
    candidates = [Path(value)]
    if folder is not None:
        candidates += [folder / value, folder / f"{value}.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    there = sorted(path.stem for path in folder.glob("*.yaml")) if folder is not None else []
    names = f"; the names in {folder.name}/ are {', '.join(there)}" if folder and there else ""
    raise InputError(f"--config {value}: No such file{names}")


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise InputError(f"line {line}: the key {key.value} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_file(path: Path, cls: type, options: list[str]) -> list[str]:
    """InputError where the file cannot be read or has a key that `cls` lacks.

    Returns options that write out a scalar of the file of which `options` set a part: with
    `r: 4` in the file, `--model.r.q 3` would otherwise lose the 4 of the other ranks.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: a mapping of keys is expected, found {type(loaded).__name__}")
    _check_keys(loaded, cls, "", path, cls)
    spelled: list[str] = []
    for option in options:
        parent, _, leaf = option.split("=")[0].removeprefix("--").rpartition(".")
        value: Any = loaded
        for part in parent.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not leaf or value is None or isinstance(value, dict):
            continue
        nested = _dataclass_in(dict(_kinds(cls)).get(parent))
        if nested is not None and hasattr(nested, "from_scalar"):
            whole = dataclasses.asdict(nested.from_scalar(value))
            spelled += [f"--{parent}", json.dumps(whole)]
    return spelled


def _check_keys(loaded: dict[str, Any], cls: type, prefix: str, path: Path, root: type) -> None:
    kinds = {f.name: f.type for f in _fields(cls)}
    types = {name: _dataclass_in(kind) for name, kind in kinds.items()}
    for key, value in loaded.items():
        if key not in types:
            raise InputError(
                f"{path}: unknown key {prefix}{key}; {_nearest(prefix + str(key), root)}"
            )
        nested = types[key]
        if nested is kinds[key] and not isinstance(value, dict):
            raise InputError(f"{path}: {prefix}{key} is {value!r}; a block of keys is expected")
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


def _nearest(key: str, cls: type) -> str:
    """What an unknown key may have meant: in its own block by name or initials, else elsewhere."""
    known = [name for name, _ in _kinds(cls)]
    block, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == block]
    leaves = {k.rpartition(".")[2]: k for k in siblings}
    by_name = [leaves[n] for n in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)]
    by_initials = [k for n, k in leaves.items() if "".join(w[:1] for w in n.split("_")) == leaf]
    elsewhere = [k for k in known if k.rpartition(".")[2] == leaf]
    match = by_name or by_initials or elsewhere or difflib.get_close_matches(key, known, 1, 0.75)
    if match:
        return f"did you mean {match[0]}?"
    return f"allowed are {', '.join(siblings or known)} (see --help)"


def _explain(message: str, cls: type, files: list[Path], options: list[str]) -> str:
    """jsonargparse's message on one line: with the nearest key, or with what a key may be."""
    message = " ".join(message.split())
    if found := re.match(r"[Uu]nrecognized arguments: (\S+)", message):
        key = found[1].lstrip("-").split("=")[0].replace("-", "_")
        if not found[1].startswith("-"):
            return f"unexpected argument {found[1]!r}; options begin with --"
        return f"unknown option {found[1]}; {_nearest(key, cls)}"
    if found := re.match(r'Parser key "([\w.]+)".*(?:Given|Got) value: (.*)', message):
        key, value = found[1], found[2]
        if inner := re.search(r"Option '(\w+)' is not accepted", message):
            return f"unknown key {key}.{inner[1]}; {_nearest(f'{key}.{inner[1]}', cls)}"
        by_option = any(option.endswith(value) for option in options)
        where = f"{files[-1]}: " if files and not by_option else ""
        return f"{where}{key} is {value!r}; allowed is {_allowed(dict(_kinds(cls)).get(key))}"
    return re.sub(r'Parser key "([\w.]+)":?', r"\1:", message)


def _kinds(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its type."""
    for field in _fields(cls):
        yield prefix + field.name, field.type
        nested = _dataclass_in(field.type)
        if nested is not None:
            yield from _kinds(nested, f"{prefix}{field.name}.")


def _allowed(kind: Any) -> str:
    """A type in words."""
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    words |= {type(None): "null", list[str]: "a list of texts"}
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(str(value) for value in typing.get_args(kind))
    nested = _dataclass_in(kind)
    if nested is not None:
        words[nested] = "{" + ", ".join(f.name for f in _fields(nested)) + "}"
    parts = [kind] if kind in words else typing.get_args(kind)
    return " or ".join(words.get(part, str(part)) for part in parts)

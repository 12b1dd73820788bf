"""Prompts from a file."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import InputError


class Prompt(NamedTuple):
    """A prompt, and the other keys of its line."""

    text: str
    fields: dict[str, Any]


def read_prompts(file: str) -> list[Prompt]:
    """The prompts of a file: .jsonl, objects with a text `prompt`; else a prompt a line, without
    empty lines. InputError, with the line, where it is not that.
    """
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"--prompts {file}: cannot be read ({reason})") from None
    given = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not given:
        raise InputError(f"--prompts {file}: there is no prompt in it")
    if path.suffix != ".jsonl":
        return [Prompt(line.removesuffix("\r"), {}) for _, line in given]
    return [_parsed(f"--prompts {file}, line {number}", line) for number, line in given]


def _parsed(where: str, line: str) -> Prompt:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: is not JSON ({error})") from None
    text = found.pop("prompt", None) if isinstance(found, dict) else None
    if not isinstance(text, str):
        raise InputError(f"{where}: an object with a text under the key prompt is expected")
    if any(0xD800 <= ord(c) < 0xE000 for c in text):
        raise InputError(f"{where}: the prompt has half of a surrogate pair, which is no text")
    return Prompt(text, found)

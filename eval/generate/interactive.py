"""Prompts from the terminal, one after the other."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import yaml

from data.tokenizer import Tokenizer
from eval.generate.complete import complete
from eval.generate.config import GenerateConfig
from model import Transformer

SETTINGS = ("temperature", "top_k", "top_p", "max_new_tokens", "seed", "stop")
HELP = f"""\
A line is a prompt; \\n in it is a line break. A line that begins with + goes on from the last text.
Ctrl-C ends a text that is being written, Ctrl-D or /quit the session.
/set KEY VALUE   changes {", ".join(SETTINGS)}
/show            their values"""


class Session:
    """Reads lines until their end. `read` gives the next, and raises EOFError behind the last."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: GenerateConfig,
        read: Callable[[str], str] = input,
    ) -> None:
        self.model, self.tokenizer, self.config, self.read = model, tokenizer, config, read
        self.last = ""

    def run(self) -> None:
        """The session."""
        print("/help says what can be typed here")
        over = False
        while not over:
            try:
                over = self._turn()
            except KeyboardInterrupt:  # it may have been meant for a text that had just ended
                print()

    def _turn(self) -> bool:
        """One line; whether the session is over."""
        try:
            line = self.read("> ")
        except EOFError:
            print()
            return True
        except UnicodeDecodeError:
            print("that is not UTF-8 text")
            return False
        if any(0xD800 <= ord(c) < 0xE000 for c in line):  # bytes that are not UTF-8
            print("that is not UTF-8 text")
        elif line.strip() == "/quit":
            return True
        elif line.startswith("/"):
            self._command(*line[1:].split(maxsplit=2))
        else:
            self._complete(line.replace("\\n", "\n"))
        return False

    def _command(self, name: str = "", key: str = "", value: str = "") -> None:
        if name == "help":
            print(HELP)
        elif name == "show":
            print(", ".join(f"{key} {getattr(self.config, key)!r}" for key in SETTINGS))
        elif name == "set" and key in SETTINGS and value:
            self._set(key, value)
        elif name == "set":
            print(f"/set KEY VALUE; keys are {', '.join(SETTINGS)}")
        else:
            print(f"/{name}: unknown; allowed are /help, /set, /show, /quit")

    def _set(self, key: str, value: str) -> None:
        try:
            parsed = yaml.safe_load(value)
            if key == "stop" and isinstance(parsed, str):
                parsed = [parsed.replace("\\n", "\n")]
            # A setting of the right type is all that __post_init__ expects.
            kind = {"stop": list, "top_k": int | None, "max_new_tokens": int, "seed": int}
            if not isinstance(parsed, kind.get(key, int | float)) or isinstance(parsed, bool):
                raise ValueError(f"--{key}: {value}")
            changed: dict[str, Any] = {key: parsed}
            self.config = dataclasses.replace(self.config, **changed)
        except (ValueError, yaml.YAMLError) as error:
            print(f"not set: {' '.join(str(error).split())}")

    def _complete(self, line: str) -> None:
        text = self.last + line[1:] if line.startswith("+") else line
        ids = self.tokenizer.encode_document(text)
        longest = self.model.config.max_seq_len
        if len(ids) >= longest:
            print(f"{len(ids)} tokens, and the model's max_seq_len is {longest}: no room for more")
            return
        print(text, end="", flush=True)
        self.last = text
        try:
            complete(self.model, self.tokenizer, [ids], [self.config.seed], self.config, self._show)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print()

    def _show(self, piece: str) -> None:
        self.last += piece
        sys.stdout.write(piece)
        sys.stdout.flush()

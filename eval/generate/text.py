"""Tokens as text: characters of several tokens, the end of a document, stop strings."""

from collections.abc import Sequence
from typing import Literal

from data.tokenizer import TextTokenizer

Finish = Literal["stop", "end", "length"]
TORN = "\N{REPLACEMENT CHARACTER}"  # what the beginning of a character decodes to


class TextStream:
    """The text that follows a prompt, as it becomes certain.

    Attributes:
        text: All that is certain so far; at the end the sample, without a stop string.
        finish: Why it ended: "stop" (a stop string), "end" (BOS or EOS, where the model says that
            the document is over); None: it has not.
    """

    def __init__(
        self, tokenizer: TextTokenizer, prompt: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.ids = list(prompt)
        self.before = len(tokenizer.decode(self.ids))
        self.text = ""
        self.finish: Finish | None = None

    def feed(self, token: int) -> str:
        """The text that the next token makes certain; it may be empty."""
        if token in (self.tokenizer.bos_id, self.tokenizer.eos_id):
            self.finish = "end"
            return self.flush()
        self.ids.append(token)
        text = self._decoded()
        if text.endswith(TORN):  # the bytes of a character are not all there yet
            return ""
        return self._show(text, whole=False)

    def flush(self) -> str:
        """The rest, when no token follows."""
        return self._show(self._decoded(), whole=True)

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.ids)[self.before :]

    def _show(self, text: str, whole: bool) -> str:
        """What of `text` is new and certain: up to a stop string, or what may become one."""
        found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.finish = "stop"
            text = text[: min(found)]
        elif not whole:
            text = text[: len(text) - self._held(text)]
        new = text[len(self.text) :]
        self.text += new
        return new

    def _held(self, text: str) -> int:
        """Characters at the end of a text that may be the beginning of a stop string."""
        return max(
            (
                size
                for stop in self.stops
                for size in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:size])
            ),
            default=0,
        )

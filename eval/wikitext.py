"""WikiText's conventions: tokens separated by spaces in, text and its word count out.

A file of WikiText (Merity et al. 2016) is text that was tokenised: punctuation stands alone,
`@-@`, `@,@` and `@.@` are marks inside of words and numbers, `<unk>` is a word out of the
vocabulary, and each line ends in a token `<eos>` that the published word perplexities count. An
article begins at a line `= Title =`.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_ARTICLE = re.compile(r"^ ?= [^=].*[^=] = ?$|^ ?= [^=] = ?$")
# What tokenising added, in the order in which it is taken away.
_UNDO = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([.,;:!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$£€]) "), r"\1"),
    (re.compile(r" (n't|'t|'s|'re|'ve|'ll|'d|'m)\b"), r"\1"),
    (re.compile(r"(\w) ' (?=s\b)"), r"\1'"),
    (re.compile(r'" ([^"]*) "'), r'"\1"'),
    (re.compile(r" {2,}"), " "),
]


@dataclass
class Article:
    """One article.

    Attributes:
        text: As it was written, as far as that can be had back; <unk> stays.
        words: Tokens of the file, the <eos> of each line counted.
    """

    text: str
    words: int


def detokenise(line: str) -> str:
    """A line of WikiText as it would be written."""
    for pattern, replacement in _UNDO:
        line = pattern.sub(replacement, line)
    return line.strip()


def articles(lines: Iterable[str]) -> Iterator[Article]:
    """The articles of a file's lines; what stands before the first title belongs to it."""
    held: list[str] = []
    for line in lines:
        if _ARTICLE.match(line.rstrip("\n")) and any(one.strip() for one in held):
            yield _article(held)
            held = []
        held.append(line)
    if held:
        yield _article(held)


def _article(lines: list[str]) -> Article:
    return Article(
        "\n".join(detokenise(line) for line in lines).strip("\n"),
        sum(len(line.split()) + 1 for line in lines),
    )

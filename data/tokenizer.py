"""SentencePiece tokenizer: loading, lossless training, document encoding."""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.errors import InputError

SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
# The trainer drops longer lines (its max_sentence_length is 4192 bytes); a character is 4 bytes at
# most.
_LINE_CHARACTERS = 1000


class TextTokenizer(Protocol):
    """What scoring a text needs of a tokenizer, whoever made it."""

    vocab_size: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""

    def encode_document(self, text: str) -> list[int]:
        """[BOS] + the ids of `text`."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`."""


class Tokenizer:
    """A SentencePiece model with a BOS id.

    Attributes: path, sha256 (hex, of the model file), vocab_size, bos_id, eos_id (-1 where the
    model has none). Raises InputError where the file is missing, unreadable, not a SentencePiece
    model or has no BOS id.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        model = _read_model(self.path)
        self.sha256 = hashlib.sha256(model).hexdigest()
        self._processor = _load_model(model, self.path)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0:
            raise InputError(
                f"tokenizer {path}: has no BOS id; every document begins with one, "
                "so train the model with --bos_id"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        return self._processor.encode(text)

    def encode_document(self, text: str) -> list[int]:
        """[BOS] + the ids of `text`. Nothing marks the end: the next document's BOS does."""
        return [self.bos_id, *self._processor.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control tokens (BOS, EOS) leave nothing."""
        return self._processor.decode([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each id stands for, int32 (vocab_size,).

        0 for control, unknown and unused ids, 1 for byte-fallback pieces; a space mark counts as
        one byte.
        """
        return np.array([self._bytes_of(i) for i in range(self.vocab_size)], dtype=np.int32)

    def _bytes_of(self, token: int) -> int:
        model = self._processor
        if model.is_control(token) or model.is_unknown(token) or model.is_unused(token):
            return 0
        if model.is_byte(token):
            return 1
        return len(model.id_to_piece(token).replace(SPACE_MARK, " ").encode())


def _read_model(path: Path) -> bytes:
    try:
        model = path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"tokenizer {path}: cannot be read ({reason}); allowed is a SentencePiece model file"
        ) from error
    if not model:
        raise InputError(f"tokenizer {path}: is empty; allowed is a SentencePiece model file")
    return model


def _load_model(model: bytes, path: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise InputError(
            f"tokenizer {path}: is not a SentencePiece model (or is damaged); "
            "allowed is a file written by the SentencePiece trainer"
        ) from error


def train_tokenizer(
    texts: Iterable[str],
    output: Path,
    vocab_size: int,
    model_type: str = "bpe",
    threads: int = 16,
    sample_bytes: int = 100_000_000,
) -> None:
    """Train a lossless SentencePiece model on the first `sample_bytes` of `texts` into `output`.

    Lossless: decode(encode(text)) == text for every text without U+2581, which SentencePiece itself
    uses for a space. Ids: unknown 0, BOS 1, EOS 2, no padding. `threads` is stored inside the model
    file, so a different number gives another checksum: leave it alone where files are compared.
    Raises InputError where the sample cannot carry `vocab_size` pieces; the message says what it
    allows.
    """
    sample = _Sample(texts, sample_bytes)
    try:
        model = _run_trainer(iter(sample), vocab_size, model_type, threads)
    except RuntimeError as error:
        if sample.error is not None:  # the library turns a reader's error into its own
            raise sample.error from None
        raise InputError(_explain(str(error), vocab_size)) from error
    aside = output.with_name(output.name + ".tmp")
    try:
        aside.write_bytes(model)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(aside)) from error
    os.replace(aside, output)


def _run_trainer(lines: Iterator[str], vocab_size: int, model_type: str, threads: int) -> bytes:
    from io import BytesIO

    from sentencepiece import SentencePieceTrainer

    model = BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=vocab_size,
        model_type=model_type,
        num_threads=threads,
        # Lossless: text goes in as it is, and what has no piece becomes bytes.
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        byte_fallback=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,  # errors come back as exceptions; the rest is console noise
    )
    return model.getvalue()


class _Sample:
    """Lines of the texts until `limit` bytes are spent. Keeps the error that a reader raised."""

    def __init__(self, texts: Iterable[str], limit: int):
        self.texts = texts
        self.limit = limit
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        left = self.limit
        try:
            for text in self.texts:
                for line in _training_lines(text):
                    left -= len(line.encode()) + 1
                    if left < 0:
                        return
                    yield line
        except BaseException as error:
            self.error = error
            raise


def _training_lines(text: str) -> Iterator[str]:
    """The non-empty lines of `text`, long ones in parts that the trainer does not skip."""
    for line in text.split("\n"):
        for start in range(0, len(line), _LINE_CHARACTERS):
            # A NUL ends a sentence inside the trainer; encoding does not mind it.
            yield line[start : start + _LINE_CHARACTERS].replace("\0", " ")


def _explain(message: str, vocab_size: int) -> str:
    """The trainer's message in one line that says which vocabulary sizes the sample allows."""
    if found := re.search(r"Vocabulary size too high .* value <= (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too large for the tokenizer's training sample: "
            f"it allows at most {found[1]}"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"vocab_size {vocab_size} is too small: 256 bytes, 3 special tokens and the sample's "
            f"characters need at least {found[1]}"
        )
    if "sentences_.empty()" in message:
        return "the tokenizer's training sample is empty; allowed is text with at least one line"
    return f"the tokenizer cannot be trained: {' '.join(message.split())}"

"""Texts on which a converted tokenizer must agree with the original."""

import random
from collections.abc import Iterator, Sequence

ODD = (
    "", " ", "  ", "   ", " a", "a ", "  two  spaces  ", "\n", "\n\n", "\t", "a\tb\n c\r\n", "\r",
    "\0", "a\0b", "Hello, world!", "3.14159 1234567890", "<s>", "</s>", "<unk>", "a<s>b </s> c",
    "<0x0A>", "<0xFF>", "naïve café", "e\u0301", "ﬁ Å ²", "Straße", "привет мир", "你好，世界",
    "日本語のテキスト", "한국어", "مرحبا", "שלום", "हिन्दी", "ไทย", "\U0001f600",
    "\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308", "\u200b", "\ufeff", "\u2028",
    "\xa0nbsp\xa0", "\u2581", "a\u2581b", "\u3000", "\U0001f9ff\U00020000", "\x01\x7f\x80",
    "def f(x):\n    return x  # done\n", "aaaaaaaaaaaaaaaaa", "ababababababa", "=" * 80, " " * 50,
    "\n" * 20, "x = {'a': [1, 2, 3]}", "http://a.b/c?d=e&f=%20", "MiXeD CaSe WORDS", "don't  'tis",
)  # fmt: skip


def texts(pieces: Sequence[str], joined: int = 300) -> Iterator[str]:
    """Odd texts, each piece alone, and `joined` random sequences of pieces."""
    yield from ODD
    yield from pieces
    generator = random.Random(0)
    for _ in range(joined):
        yield "".join(generator.choices(pieces, k=generator.randint(2, 12)))

"""Small corpora, a small tokenizer, and the real command line run in this process."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from data.errors import run_cli
from data.prepare import main
from data.tokenizer import Tokenizer, train_tokenizer


def make_texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """`count` different texts of made-up words in lines, reproducible."""
    draw = random.Random(seed)
    letters = "etaoinshrdlu"
    vocabulary = ["".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(400)]
    return [
        "\n".join(" ".join(draw.choices(vocabulary, k=12)) for _ in range(max(1, words // 12)))
        + f"\nend of text {index}.\n"
        for index in range(count)
    ]


@dataclass
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def run_prepare(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`python -m data.prepare ARGS...` without starting a Python."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            run_cli(lambda: main([str(argument) for argument in arguments]))
        printed = capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        return Outcome(code, printed.out, printed.err)

    return run


@pytest.fixture
def refused(run_prepare, tmp_path: Path, model_file: Path) -> Callable[..., str]:
    """Run a command that must fail as the user's error; returns its one line."""

    def run(*arguments: object, tokenizer: object = model_file) -> str:
        options = ["--tokenizer", tokenizer] if tokenizer is not None else []
        result = run_prepare(*arguments, *options, "--output", tmp_path / "out", "--processes", 1)
        assert result.code == 2, result
        assert result.err.startswith("error: "), result
        assert result.err.count("\n") == 1, result
        return result.err

    return run


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(make_texts(200), path, vocab_size=420)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_file: Path) -> Tokenizer:
    return Tokenizer(model_file)

"""A small tokenizer of real text, which has fewer ids than the models of these tests."""

from pathlib import Path

import pytest
import torch

from data.embedded import embedded_documents
from data.tokenizer import Tokenizer, train_tokenizer

IDS = 390


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The ids of a test are the same each time."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample() -> list[str]:
    """Twenty documents of prose and code."""
    return [text for _, (_, text) in zip(range(20), embedded_documents(), strict=False)]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory, sample: list[str]) -> Path:
    """Trained as data.prepare trains one."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(sample, path, IDS, threads=1)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    """The tokenizer of that file."""
    return Tokenizer(tokenizer_file)

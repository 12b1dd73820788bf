"""Generation: what is sampled, from what distribution, and how it is printed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from data.tokenizer import Tokenizer
from eval import generate as command
from eval.generate import GenerateConfig, generate, probabilities, stream_text
from model import Transformer
from training import checkpoint


@pytest.fixture(scope="module")
def model(trained: Path) -> Transformer:
    return checkpoint.load_model(checkpoint.resolve(trained), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def tokenizer(trained: Path) -> Tokenizer:
    return checkpoint.load_tokenizer(checkpoint.resolve(trained))


def config(**options: Any) -> GenerateConfig:
    return GenerateConfig(checkpoint="", **options)


@torch.no_grad()
def test_greedy_takes_the_most_likely_token_of_a_forward_without_cache(model: Transformer):
    ids = [1, 50, 60, 70]
    found = list(
        generate(model, ids, config(temperature=0, max_new_tokens=20), seed=0, vocab_size=400)
    )
    for token in found:
        assert token == int(model(torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, token]
    assert len(found) == 20


def test_seed_decides_the_sample(model: Transformer):
    def sample(seed: int) -> list[int]:
        return list(generate(model, [1], config(temperature=1.0, max_new_tokens=30), seed, 400))

    assert sample(3) == sample(3)
    assert sample(3) != sample(4)


def test_ids_beyond_the_tokenizer_are_never_taken(model: Transformer):
    options = config(temperature=50.0, max_new_tokens=60)
    assert max(generate(model, [1], options, seed=0, vocab_size=10)) < 10


def test_text_ends_at_max_seq_len(model: Transformer):
    ids = [1] * 60
    assert len(list(generate(model, ids, config(max_new_tokens=50), seed=0, vocab_size=400))) == 4


def test_temperature_top_k_and_top_p():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    plain = torch.softmax(logits.double(), 0)
    assert torch.allclose(probabilities(logits, 1.0, None, 1.0), plain)
    assert torch.allclose(
        probabilities(logits, 0.5, None, 1.0), torch.softmax(2 * logits.double(), 0)
    )
    top2 = probabilities(logits, 1.0, 2, 1.0)
    assert torch.allclose(top2, torch.tensor([*(plain[:2] / plain[:2].sum()), 0, 0]).double())
    # plain is .644 .237 .087 .032: .644 < .7 <= .881, so two tokens are kept
    nucleus = probabilities(logits, 1.0, None, 0.7)
    assert torch.allclose(nucleus, top2)
    assert probabilities(logits, 1.0, None, 1e-9).tolist() == [1, 0, 0, 0]
    shuffled = probabilities(logits[[2, 0, 3, 1]], 1.0, None, 0.7)
    assert torch.allclose(shuffled, nucleus[[2, 0, 3, 1]])


def test_top_k_is_exact_with_ties():
    assert int((probabilities(torch.zeros(9), 1.0, 4, 1.0) > 0).sum()) == 4


def test_streamed_pieces_are_the_text_and_no_character_is_torn(tokenizer: Tokenizer):
    text = "naïve 😀 text\n\tdef f(x):  return 'é'"
    prompt = tokenizer.encode_document("so:\n")
    ids = tokenizer.encode_document("so:\n" + text)[len(prompt) :]
    pieces = list(stream_text(iter([*ids, tokenizer.bos_id, 99]), tokenizer, prompt))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) > 5


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    command.main()


def test_command_prints_and_writes_its_texts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    output = tmp_path / "out.json"
    options = ["--checkpoint", trained, "--prompt", "The", "--num_samples", 2]
    run(monkeypatch, *options, "--max_new_tokens", 10, "--output", output)
    texts = json.loads(output.read_text())["texts"]
    printed = capsys.readouterr().out
    assert len(set(texts)) == 2
    assert all("The" + text in printed for text in texts)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--temperature", "-1"], "--temperature: -1"),
        (["--temperature", "1e-320"], "--temperature"),
        (["--prompt", "a\udcff"], "--prompt"),
        (["--top_p", "0"], "--top_p: 0"),
        (["--top_k", "0"], "--top_k: 0"),
        (["--max_new_tokens", "none"], "max_new_tokens"),
        (["--prompt", "word " * 100], "--prompt"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_input(options: list, expected: str, trained: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=expected):
        run(monkeypatch, "--checkpoint", trained, *options)

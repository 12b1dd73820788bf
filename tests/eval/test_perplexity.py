"""Perplexity: the same at every micro-batch size and rank count, and equal to a naive count."""

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.shards import PreparedData, TokenStream
from eval import perplexity
from eval.perplexity import Score, score, windows
from model import Transformer
from tests.conftest import BIN, Runs, finish, free_port
from training import checkpoint

CPU = torch.device("cpu")


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_windows_score_every_target_once_with_enough_context(targets: int, seq_len: int, data: Any):
    stride = data.draw(st.integers(1, seq_len))
    seen: list[int] = []
    for number, (start, first, end) in enumerate(windows(targets, seq_len, stride)):
        assert 0 <= start <= first < end <= targets
        assert end - start <= seq_len
        if number:
            assert first - start == seq_len - stride, "context before the first scored target"
        seen.extend(range(first, end))
    assert seen == list(range(targets))


@pytest.fixture(scope="module")
def model(trained: Path) -> Transformer:
    return checkpoint.load_model(checkpoint.resolve(trained), CPU, torch.float32)


@pytest.fixture(scope="module")
def stream(prepared: Path) -> TokenStream:
    return PreparedData.open(prepared).split("test")


@pytest.fixture(scope="module")
def token_bytes(prepared: Path) -> Any:
    return PreparedData.open(prepared).tokenizer.token_bytes()


def evaluate(model: Transformer, stream: TokenStream, token_bytes: Any, **options: Any) -> Score:
    @torch.no_grad()
    def token_losses(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return model(inputs, targets, reduction="none")

    return score(token_losses, stream, token_bytes, device=CPU, **{"seq_len": 32, **options})


@torch.no_grad()
def naive_nats(model: Transformer, tokens: torch.Tensor, seq_len: int, stride: int) -> float:
    """Each token predicted alone, in fp64, from the window that scores it."""
    exact = copy.deepcopy(model).double()
    total = 0.0
    for target in range(1, len(tokens)):
        start = max(0, math.ceil((target - seq_len) / stride) * stride)
        logits = exact(tokens[None, start:target])[0, -1]
        total -= float(F.log_softmax(logits.double(), dim=-1)[tokens[target]])
    return total


@pytest.mark.parametrize("stride", [32, 8])
def test_score_is_that_of_a_naive_count(
    model: Transformer, stream: TokenStream, token_bytes: Any, stride: int
):
    found = evaluate(model, stream, token_bytes, stride=stride, micro_batch_size=3, max_tokens=299)
    tokens = torch.from_numpy(stream.read(0, 300))
    assert found.tokens == 299
    assert found.nats == pytest.approx(naive_nats(model, tokens, 32, stride), rel=1e-6)


def test_same_at_every_micro_batch_size(model: Transformer, stream: TokenStream, token_bytes: Any):
    reference = evaluate(model, stream, token_bytes, micro_batch_size=1)
    for size in (2, 7, 64):
        found = evaluate(model, stream, token_bytes, micro_batch_size=size)
        assert found.loss == pytest.approx(reference.loss, rel=1e-6)
        assert (found.tokens, found.bytes, found.words) == (
            reference.tokens,
            reference.bytes,
            reference.words,
        )


def test_bytes_and_words_are_those_of_the_text(stream: TokenStream, prepared: Path):
    manifest = json.loads((prepared / "manifest.json").read_text())["splits"]["test"]
    assert (stream.text_bytes, stream.words) == (manifest["bytes"], manifest["words"])
    result = Score(nats=100.0, tokens=20, bytes=50, words=10).to_dict()
    assert result["loss_nats_per_token"] == 5
    assert result["perplexity"] == pytest.approx(math.exp(5))
    assert result["bits_per_byte"] == pytest.approx(100 / math.log(2) / 50)
    assert result["word_perplexity"] == pytest.approx(math.exp(10))


def test_part_of_a_stream_counts_the_bytes_of_its_tokens(
    model: Transformer, stream: TokenStream, token_bytes: Any
):
    whole = evaluate(model, stream, token_bytes)
    almost = evaluate(model, stream, token_bytes, max_tokens=whole.tokens - 1)
    last = int(stream.read(len(stream) - 1, 1)[0])
    assert whole.bytes == stream.text_bytes
    assert almost.tokens == whole.tokens - 1
    assert almost.words is None
    assert almost.bytes == whole.bytes - token_bytes[last]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`python -m eval.perplexity` in this process."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: Any) -> None:
        monkeypatch.setattr("sys.argv", ["perplexity", *map(str, arguments)])
        assert perplexity.main() == 0

    return run


def test_command_on_a_folder_a_step_and_a_file(
    command: Callable[..., None], trained: Path, prepared: Path, tmp_path: Path
):
    final = json.loads((trained / "final.json").read_text())
    outputs = [tmp_path / "a.json", tmp_path / "b.json"]
    command("--checkpoint", trained, "--data", prepared, "--output", outputs[0])
    step = trained / "checkpoints" / "step-00000003"
    command("--checkpoint", step, "--data", prepared, "--output", outputs[1])
    newest, older = (json.loads(path.read_text()) for path in outputs)
    for key in ("loss_nats_per_token", "bits_per_byte", "perplexity"):
        assert newest[key] == pytest.approx(final[key], rel=1e-6)
    assert {"word_perplexity", "tokens", "bytes", "words"} <= set(newest)
    assert (newest["step"], older["step"]) == (6, 3)
    assert older["loss_nats_per_token"] > newest["loss_nats_per_token"]
    text = "A text of its own.\nWith two lines, and ünïcödé."
    (tmp_path / "text.txt").write_text(text)
    command("--checkpoint", trained, "--data", tmp_path / "text.txt", "--output", outputs[0])
    found = json.loads(outputs[0].read_text())
    assert found["bytes"] == len(text.encode())
    assert found["words"] == len(text.split())


def test_two_ranks_give_what_one_gives(
    command: Callable[..., None], trained: Path, prepared: Path, tmp_path: Path, runs: Runs
):
    options = ["--checkpoint", str(trained), "--data", str(prepared), "--stride", "16"]
    command(*options, "--output", tmp_path / "one.json")
    launcher = [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"]
    output = str(tmp_path / "two.json")
    finish(runs.launch([*launcher, "-m", "eval.perplexity", *options, "--output", output]))
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    loss = one.pop("loss_nats_per_token")
    assert two.pop("loss_nats_per_token") == pytest.approx(loss, rel=1e-6)
    for key in ("tokens", "bytes", "words"):
        assert one[key] == two[key]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--checkpoint", "nowhere", "--data", "DATA"], "nowhere: no such folder"),
        (["--checkpoint", "RUN", "--data", "nowhere.txt"], "nowhere.txt"),
        (["--checkpoint", "RUN", "--data", "EMPTY"], "empty"),
        (["--checkpoint", "RUN", "--data", "LATIN"], "UTF-8"),
        (["--checkpoint", "RUN", "--data", "DATA", "--split", "dev"], "'dev'"),
        (["--checkpoint", "RUN", "--data", "DATA", "--seq_len", "65"], "--seq_len: 65"),
        (["--checkpoint", "RUN", "--data", "DATA", "--stride", "33"], "--stride: 33"),
        (["--checkpoint", "RUN", "--data", "DATA", "--stride", "0"], "--stride: 0"),
        (["--checkpoint", "RUN", "--data", "DATA", "--strid", "4"], "strid"),
        (["--checkpoint", "RUN", "--data", "OTHER"], "its tokenizer (sha256"),
        (["--checkpoint", "RUN"], "data"),
    ],
)
def test_bad_input_is_refused_with_one_line(
    arguments: list[str],
    expected: str,
    trained: Path,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    names = {"RUN": trained, "DATA": prepared, "EMPTY": tmp_path / "empty.txt"}
    names |= {"LATIN": tmp_path / "latin.txt", "OTHER": tmp_path / "other"}
    if "OTHER" in arguments:
        other_tokenizer(prepared, tmp_path / "other")
    monkeypatch.setattr("sys.argv", ["perplexity", *(str(names.get(a, a)) for a in arguments)])
    with pytest.raises((InputError, OSError)) as caught:
        perplexity.main()
    assert expected in str(caught.value)


def other_tokenizer(prepared: Path, folder: Path) -> None:
    from data.prepare import main

    text = folder.with_name("other.txt")
    text.write_text("other words entirely " * 200)
    options = ["--input", str(text), "--vocab_size", "280", "--processes", "1"]
    main([*options, "--output", str(folder), "--valid_fraction", "0", "--test_fraction", "0"])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.model", "model.json"])
def test_damaged_checkpoint_is_named(
    name: str, trained: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = tmp_path / "step"
    shutil.copytree(checkpoint.resolve(trained), step)
    (step / name).write_bytes((step / name).read_bytes()[:-10])
    monkeypatch.setattr(sys, "argv", ["p", "--checkpoint", str(step), "--data", str(prepared)])
    with pytest.raises(InputError, match=name):
        perplexity.main()

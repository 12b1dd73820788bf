"""Perplexity: the same at every micro-batch size and rank count, and equal to a naive count."""

import copy
import itertools
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from data.errors import InputError
from data.shards import PreparedData, TokenStream
from eval import perplexity, wikitext
from eval.scoring import Score, document_windows, score, windows
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


@given(st.lists(st.integers(1, 30), min_size=1), st.integers(1, 12), st.data())
def test_document_windows_score_every_token_but_bos_within_its_document(
    lengths: list[int], seq_len: int, data: Any
):
    stride = data.draw(st.integers(1, seq_len))
    total = sum(lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    scored = sum(lengths) - len(lengths)
    limit = data.draw(st.integers(1, scored)) if scored else None
    found = document_windows(starts, total, seq_len, stride, limit)
    bos = set(starts.tolist())
    document = np.repeat(np.arange(len(lengths)), lengths)
    seen: list[int] = []
    for start, first, end in found:
        assert end - start <= seq_len
        assert document[start] == document[end], "no token of another document is read"
        seen.extend(range(first + 1, end + 1))
    expected = [i for i in range(total) if i not in bos]
    assert sorted(seen) == expected[:limit]
    sizes = [one.end - one.start for one in found]
    assert sizes == sorted(sizes, reverse=True)


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
def naive_nats(
    model: Transformer, tokens: torch.Tensor, seq_len: int, stride: int, document: bool = False
) -> float:
    """Each token predicted alone, in fp64, from the window that scores it."""
    exact = copy.deepcopy(model).double()
    total = 0.0
    for target in range(1, len(tokens)):
        start = max(0, math.ceil((target - seq_len) / stride) * stride)
        if document:  # its last window reaches back
            start = max(0, min(start, len(tokens) - 1 - seq_len))
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


@pytest.mark.parametrize("stride", [32, 8])
def test_documents_alone_are_those_of_a_naive_count(
    model: Transformer, prepared: Path, token_bytes: Any, stride: int
):
    texts = [
        "One short text.",
        "x",
        "",
        "Another text, longer than a window of tokens. " * 3,
        "End",
    ]
    stream = TokenStream.from_documents(texts, PreparedData.open(prepared).tokenizer)
    assert stream.documents == 4
    found = evaluate(model, stream, token_bytes, stride=stride, per_document=True)
    starts = [*stream.document_starts().tolist(), len(stream)]
    expected = 0.0
    for start, end in itertools.pairwise(starts):
        tokens = torch.from_numpy(stream.read(start, end - start))
        expected += naive_nats(model, tokens, 32, stride, document=True)
    assert found.tokens == len(stream) - stream.documents
    assert found.nats == pytest.approx(expected, rel=1e-6)
    assert found.bytes == stream.text_bytes
    few = evaluate(model, stream, token_bytes, per_document=True, micro_batch_size=1)
    assert evaluate(model, stream, token_bytes, per_document=True).loss == pytest.approx(few.loss)


@torch.no_grad()
def test_loss_by_context_is_that_of_each_place(
    model: Transformer, stream: TokenStream, token_bytes: Any
):
    found = evaluate(model, stream, token_bytes, max_tokens=320)
    tokens = torch.from_numpy(stream.read(0, 321))
    losses = model(
        tokens[:-1].view(10, 32), tokens[1:].view(10, 32), reduction="none"
    ).double()  # (10, 32)
    table = {
        (row["context_tokens_from"], row["context_tokens_to"]): row for row in found.context_table()
    }
    assert list(table) == [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32)]
    for (first, last), row in table.items():
        part = losses[:, first - 1 : last]
        assert row["loss_nats_per_token"] == pytest.approx(float(part.mean()), rel=1e-6)
        assert row["tokens"] == part.numel()


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


def test_several_data_sets_in_one_run(
    command: Callable[..., None], trained: Path, prepared: Path, tmp_path: Path, capsys: Any
):
    (tmp_path / "text.txt").write_text("Words of a text, and some more of them.")
    data = [prepared, tmp_path / "text.txt"]
    command("--checkpoint", trained, "--data", *data, "--output", tmp_path / "both.json")
    printed = capsys.readouterr().out
    both = json.loads((tmp_path / "both.json").read_text())
    for one in data:
        command("--checkpoint", trained, "--data", one, "--output", tmp_path / "one.json")
        alone = json.loads((tmp_path / "one.json").read_text())
        assert alone["results"][0] == next(r for r in both["results"] if r["data"] == str(one))
        assert alone["loss_nats_per_token"] == alone["results"][0]["loss_nats_per_token"]
        assert f"{alone['perplexity']:.3f}" in printed
    assert "perplexity" not in both, "no number that could be taken for that of all"


WIKITEXT = [
    " \n",
    " = A title = \n",
    " \n",
    ' The " first " well @-@ known one had 1 @,@ 500 ( or 0 @.@ 5 ) , did n\'t it ? \n',
    " = = A section = = \n",
    " Its <unk> ; the fox 's . \n",
    " = Another = \n",
    " Short . \n",
]


def test_wikitext_is_detokenised_and_counted_as_published():
    first, second = wikitext.articles(WIKITEXT)
    assert first.text == (
        "= A title =\n\n"
        'The "first" well-known one had 1,500 (or 0.5), didn\'t it?\n'
        "= = A section = =\nIts <unk>; the fox's."
    )
    assert second.text == "= Another =\nShort."
    counted = [sum(len(line.split()) + 1 for line in part) for part in (WIKITEXT[:6], WIKITEXT[6:])]
    assert [first.words, second.words] == counted


def test_wikitext_of_a_prepared_folder_is_refused(
    command: Callable[..., None], trained: Path, prepared: Path
):
    with pytest.raises(InputError, match=r"--wikitext: .* is a prepared folder"):
        command("--checkpoint", trained, "--data", prepared, "--wikitext")


def test_wikitext_through_the_command(command: Callable[..., None], trained: Path, tmp_path: Path):
    (tmp_path / "wiki.tokens").write_text("".join(WIKITEXT))
    options = ["--checkpoint", trained, "--data", tmp_path / "wiki.tokens", "--wikitext"]
    command(*options, "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    texts = [one.text for one in wikitext.articles(WIKITEXT)]
    assert found["bytes"] == sum(len(text.encode()) for text in texts)
    assert found["words"] == sum(one.words for one in wikitext.articles(WIKITEXT))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny GPT-2 of transformers and a tokenizer trained on a sentence."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<e>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["some words, some other words"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>").save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_model_of_hugging_face(
    command: Callable[..., None], hugging_face: Path, tmp_path: Path, prepared: Path
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = "some words, and others that it has not seen"
    (tmp_path / "text.txt").write_text(text)
    name = f"hf:{hugging_face}"
    options = ["--checkpoint", name, "--seq_len", "16", "--stride", "4", "--micro_batch_size", "3"]
    command(*options, "--data", tmp_path / "text.txt", "--output", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    ids = [0, *AutoTokenizer.from_pretrained(hugging_face)(text)["input_ids"]]
    model = AutoModelForCausalLM.from_pretrained(hugging_face, dtype=torch.float64)
    expected = 0.0
    for target in range(1, len(ids)):
        start = max(0, math.ceil((target - 16) / 4) * 4)
        logits = model(torch.tensor([ids[start:target]])).logits[0, -1]
        expected -= float(F.log_softmax(logits, dim=-1)[ids[target]])
    assert found["tokens"] == len(ids) - 1
    assert found["loss_nats_per_token"] == pytest.approx(expected / (len(ids) - 1), rel=1e-6)
    assert found["bytes"] == len(text.encode())
    with pytest.raises(InputError, match=r"its tokenizer .* is not the one that hf:"):
        command(*options, "--data", prepared)
    with pytest.raises(InputError, match=r"hf:.*cannot be loaded"):
        command("--checkpoint", f"hf:{tmp_path}", "--data", tmp_path / "text.txt")


@pytest.mark.parametrize("mode", [["--stride", "16"], ["--per_document"]])
def test_two_ranks_give_what_one_gives(
    mode: list[str],
    command: Callable[..., None],
    trained: Path,
    prepared: Path,
    tmp_path: Path,
    runs: Runs,
):
    options = ["--checkpoint", str(trained), "--data", str(prepared), *mode]
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

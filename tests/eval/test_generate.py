"""Generation: what is sampled, from what distribution, and how it is printed."""

import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data.errors import InputError
from data.tokenizer import Tokenizer
from eval.generate import Decoder, GenerateConfig, generate
from eval.generate import __main__ as command
from eval.generate.complete import complete, complete_all
from eval.generate.interactive import Session
from eval.generate.prompts import read_prompts
from eval.generate.sampling import probabilities
from eval.generate.text import TextStream
from model import ModelConfig, Transformer
from model.delta.command.backbones import write_backbone
from model.transformer import init_weights
from tests.conftest import ROOT
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


# --- text ----------------------------------------------------------------------------------------


def feed(stream: TextStream, ids: list[int]) -> list[str]:
    """The pieces of a stream up to its end."""
    pieces = []
    for token in ids:
        pieces.append(stream.feed(token))
        if stream.finish is not None:
            return pieces
    return [*pieces, stream.flush()]


def test_streamed_pieces_are_the_text_and_no_character_is_torn(tokenizer: Tokenizer):
    text = "naïve 😀 text\n\tdef f(x):  return 'é'"
    prompt = tokenizer.encode_document("so:\n")
    ids = tokenizer.encode_document("so:\n" + text)[len(prompt) :]
    stream = TextStream(tokenizer, prompt)
    pieces = feed(stream, [*ids, tokenizer.bos_id, 99])
    assert "".join(pieces) == stream.text == text
    assert stream.finish == "end"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 5


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two\n\nthree", ["\n\n"], "one two"),
        ("one two\nthree", ["\n\n"], None),
        ("abcabd", ["abd"], "abc"),
        ("aab", ["ab"], "a"),
        ("x END y", ["END y", "END"], "x "),
        ("x END", ["END y"], None),
        ("so: a", ["so:"], ""),
    ],
)
def test_a_stop_string_ends_the_text_before_it(tokenizer: Tokenizer, text, stops, expected):
    """Also one that begins in the middle of a token or is several; nothing of it is ever shown."""
    prompt = tokenizer.encode_document("so:")  # in the prompt it ends nothing
    stream = TextStream(tokenizer, prompt, stops)
    pieces = feed(stream, tokenizer.encode(text))
    assert "".join(pieces) == stream.text == (text if expected is None else expected)
    assert stream.finish == (None if expected is None else "stop")


def test_the_first_of_several_stop_strings_ends_the_text(tokenizer: Tokenizer):
    """Also where one token, or a character that was torn, brings both at once."""
    stream = TextStream(tokenizer, tokenizer.encode_document("so:"), ["three", "two"])
    assert stream._show("one two three", whole=True) == "one "
    assert stream.finish == "stop"


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["full", "value_latent", "latent"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_a_batch_are_what_they_are_alone(model: Transformer, cache, temperature):
    """Prompts of unequal length, one of which reaches max_seq_len and leaves the others."""
    prompts = [[1, *range(40, 40 + n)] for n in (3, 57, 20)]
    options = config(max_new_tokens=12, temperature=temperature, cache=cache)
    found: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for step in Decoder(model, prompts, options, [4, 5, 6], 320).steps():
        for row, sampled in step.items():
            found[row].append(sampled.token)
    plain = config(max_new_tokens=12, temperature=temperature)
    for row, ids in enumerate(prompts):
        assert found[row] == list(generate(model, ids, plain, 4 + row, 320))
    assert [len(ids) for ids in found.values()] == [12, 6, 12]


@torch.no_grad()
def test_log_probabilities_are_the_models_own(model: Transformer):
    """Of the forward pass without cache, over all ids; not those of temperature and top_k."""
    prompts = [[1, 50], [1, 60, 70, 80]]
    options = config(max_new_tokens=8, temperature=3.0, top_k=5)
    steps = list(Decoder(model, prompts, options, [0, 1], 320).steps())
    for row, ids in enumerate(prompts):
        tokens = [step[row].token for step in steps]
        logits = model(torch.tensor([[*ids, *tokens]]))[0, len(ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert [step[row].logprob for step in steps] == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_ended_row_is_computed_no_more(model: Transformer):
    sizes = []
    head = model.lm_head
    handle = head.register_forward_pre_hook(lambda _m, args: sizes.append(args[0].shape[:2]))
    decoder = Decoder(model, [[1], [1, 2], [1]], config(max_new_tokens=4), [0, 1, 2], 320)
    for number, _ in enumerate(decoder.steps()):
        if number == 1:
            decoder.end(0)
    handle.remove()
    assert sizes == [(3, 1), (3, 1), (2, 1), (2, 1)]  # logits of the last position alone


def test_all_prompts_in_batches_keep_their_order_and_seeds(
    model: Transformer, tokenizer: Tokenizer
):
    prompts = [tokenizer.encode_document(text) for text in ("return the", "a", "import sys as")]
    options = config(max_new_tokens=6, num_samples=2, batch_size=4, seed=3, temperature=1.0)
    told: list[int] = []
    found = complete_all(model, tokenizer, prompts, options, told.append)
    assert told == [4, 2]
    for ids, samples in zip(prompts, found, strict=True):
        for number, sample in enumerate(samples):
            alone = complete(model, tokenizer, [ids], [3 + number], options)[0]
            assert (alone.text, alone.finish) == (sample.text, sample.finish)


# --- the command ---------------------------------------------------------------------------------


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


def test_single_text_is_printed_as_it_comes_and_each_token_is_written(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    output = tmp_path / "out.json"
    run(monkeypatch, "--checkpoint", trained, "--prompt", "The", "--max_new_tokens", 5,
        "--stop", '["zzzz"]', "--cache", "latent", "--output", output)  # fmt: skip
    result = json.loads(output.read_text())
    sample = result["completions"][0]["samples"][0]
    assert capsys.readouterr().out == "The" + sample["text"] + "\n"
    assert len(sample["tokens"]) == 5
    assert sample["finish"] == "length"
    assert all(token["logprob_nats"] < 0 for token in sample["tokens"])


def test_prompts_of_a_file(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    output, file = tmp_path / "out.json", tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The", "id": 7}\n\n{"prompt": ""}\n')
    options = ["--checkpoint", trained, "--max_new_tokens", 5, "--num_samples", 2]
    run(monkeypatch, *options, "--prompts", file, "--output", output)
    first, second = json.loads(output.read_text())["completions"]
    assert (first["id"], first["prompt"], second["prompt"]) == (7, "The", "")
    printed = capsys.readouterr().out
    assert all("The" + sample["text"] in printed for sample in first["samples"])
    lines = tmp_path / "prompts.txt"
    lines.write_text("The\n\nimport\r\n")
    assert [one.text for one in read_prompts(str(lines))] == ["The", "import"]


def test_interactive(model: Transformer, tokenizer: Tokenizer, capsys: pytest.CaptureFixture):
    lines = iter(
        [
            "The", "+ and", "/set temperature 0", "The", "/set top_k many", "/set seed 1.5",
            "/set temperature -1", "/nothing", "/show", "/help", "word " * 100, "a\\nb",
            '/set stop "\\n"', "/set stop [1, 2]", "/set seed 99999999999999999999999", "x\udcff",
            "ctrl-c", "/show",
        ]
    )  # fmt: skip

    def read(prompt: str) -> str:
        print(prompt, end="")
        line = next(lines, None)
        if line is None:
            raise EOFError
        if line == "ctrl-c":
            raise KeyboardInterrupt
        return line

    session = Session(model, tokenizer, config(max_new_tokens=5, cache="value_latent"), read)
    session.run()
    parts = capsys.readouterr().out.split("> ")
    first = parts[1].removesuffix("\n")
    assert first.startswith("The")
    assert parts[2].startswith(first + " and")
    greedy = list(generate(model, tokenizer.encode_document("The"), session.config, 0, 400))
    assert parts[4] == "The" + tokenizer.decode(greedy) + "\n"
    assert "not set: --top_k: many" in parts[5]
    assert "not set: --seed: 1.5" in parts[6]
    assert "not set: --temperature: -1" in parts[7]
    assert "/nothing: unknown" in parts[8]
    assert "temperature 0" in parts[9]
    assert "no room" in parts[11]
    assert parts[12].startswith("a\nb")
    assert session.config.stop == ["\n"]
    assert "not set: --stop: [1, 2]" in parts[14]
    assert "not set: --seed: 9999" in parts[15]
    assert "not UTF-8" in parts[16]
    assert "temperature" in parts[18]  # Ctrl-C at the prompt leaves the session as it is


def test_ctrl_c_ends_the_text_and_ctrl_d_the_session(trained: Path):
    """In a real terminal."""
    terminal, other = pty.openpty()
    options = ["--checkpoint", str(trained), "--interactive", "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.generate", *options],
        cwd=ROOT, stdin=other, stdout=other, stderr=other, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(other)
    seen = b""

    def until(wanted: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 90
        while wanted not in seen and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 4096)
        assert wanted in seen, seen

    try:
        until(b"> ")
        os.write(terminal, b"/set max_new_tokens 100000\nThe\n")
        until(b"\nThe")
        seen = b""
        os.write(terminal, b"\x03")
        until(b"> ")  # stopped, or at max_seq_len already: the session goes on
        os.write(terminal, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(terminal)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot be read"),
        ("", "no prompt"),
        ("\n \n", "no prompt"),
        ('{"prompt": "a"}\n{', "line 2: is not JSON"),
        ('{"text": "a"}', "line 1: .*under the key prompt"),
        ('["a"]', "line 1: .*under the key prompt"),
        ('{"prompt": "\\ud800"}', "line 1: .*surrogate"),
    ],
)
def test_files_of_prompts_that_are_none(tmp_path: Path, content: str | None, expected: str):
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=rf"--prompts {file}.*{expected}"):
        read_prompts(str(file))


@pytest.mark.parametrize("form", ["value_latent", "latent"])
def test_a_cache_of_latents_needs_latents(trained: Path, tmp_path: Path, form: str, monkeypatch):
    vanilla = Transformer(ModelConfig(400, 32, 48, 1, 2, max_seq_len=64))
    init_weights(vanilla, 0)
    write_backbone(str(trained), vanilla, tmp_path / "vanilla")
    with pytest.raises(InputError, match=rf"--cache: {form} .*v_proj"):
        run(monkeypatch, "--checkpoint", tmp_path / "vanilla", "--cache", form)


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["--execution.attention", "flash"], "flash takes no document mask"),
        (
            ["--execution.attention", "flex", "--cache", "latent"],
            "flex takes no mask over a cache of latents",
        ),
        (["--execution.attention", "flash", "--batch_size", "1"], None),
        (["--execution.attention", "flex"], None),
        (["--execution.attention", "math", "--cache", "latent"], None),
    ],
)
def test_attention_without_masks_takes_no_prompts_of_unequal_lengths(
    options: list[str], refused: str | None, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    file = tmp_path / "prompts.txt"
    file.write_text("The\nThe module of the class\n")
    words = ["--checkpoint", trained, "--prompts", file, "--max_new_tokens", 2, *options]
    if refused is None:
        run(monkeypatch, *words)
        return
    with pytest.raises(InputError, match=rf"--execution\.attention: {refused}.* or --batch_size 1"):
        run(monkeypatch, *words)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--output", "."], "--output .: it is a folder; a file is expected"),
        (["--temperature", "-1"], "--temperature: -1"),
        (["--stop", '[""]'], "--stop"),
        (["--seed", "99999999999999999999999"], "--seed"),
        (["--seed", "-1"], "--seed: -1"),
        (["--batch_size", "0"], "--batch_size: 0"),
        (["--cache", "none"], "cache"),
        (["--prompt", "a", "--interactive", "true"], "--interactive"),
        (["--interactive", "true", "--output", "a.json"], "--interactive"),
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

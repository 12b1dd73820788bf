"""The lm-evaluation-harness adapter: log-likelihoods against a naive count, against perplexity, and
against lm-eval's own backend for Hugging Face's models.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.errors import InputError
from data.shards import PreparedData, TokenStream
from eval.harness import __main__ as command
from eval.harness import local
from eval.harness.adapter import HarnessModel
from eval.models import Scorable, load
from eval.scoring import score
from model.execution import Execution
from training import checkpoint

CPU = torch.device("cpu")

# Two questions of each task, as its file describes them.
ROWS: dict[str, list[dict[str, Any]]] = {
    "blimp": [
        {"sentence_good": "The cats sleep.", "sentence_bad": "The cats sleeps.", "UID": "one"},
        {"sentence_good": "She has gone.", "sentence_bad": "She has went.", "UID": "two"},
    ],
    "hellaswag": [
        {"query": "A man sits", "choices": ["and reads.", "blue.", "four.", "up of"], "label": 0},
        {"query": "The dog", "choices": ["on.", "barks.", "is.", "was of."], "label": 1},
    ],
    "arc_easy": [{"question": "What is hot?", "choices": ["ice", "fire"], "label": 1}] * 2,
    "arc_challenge": [{"question": "What is wet?", "choices": ["sand", "rain"], "label": 1}] * 2,
    "boolq": [
        {"passage": "Fire is hot.", "question": "is fire hot", "answer": True},
        {"passage": "Ice is cold.", "question": "is ice hot", "answer": False},
    ],
    "winogrande": [
        {"sentence": "Ann saw Bea as _ was late.", "option1": "Ann", "option2": "Bea",
         "answer": "2"},
        {"sentence": "The cup fell off the box as _ was small.", "option1": "cup",
         "option2": "box", "answer": "1"},
    ],
    "commonsense_qa": [
        {"question": "Where is a fish? ", "choices": ["sea", "sky", "bed", "car", "sun"],
         "label": 0}
    ] * 2,
    "sciq": [
        {"support": " It is hot.", "question": "How is it?", "correct_answer": "hot",
         "distractor1": "cold", "distractor2": "old", "distractor3": "far"}
    ] * 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def task_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in ROWS.items():
        (folder / name).mkdir()
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name / "validation.jsonl").write_text(lines)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`python -m eval.harness` in this process, without a network; what it wrote."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def start(*arguments: Any) -> dict[str, Any]:
        output = tmp_path / "harness.json"
        monkeypatch.setattr("sys.argv", ["harness", *map(str, arguments), "--output", str(output)])
        assert command.main() == 0
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    return start


@pytest.fixture(scope="module")
def scorable(trained: Path) -> Scorable:
    return load(str(trained), CPU, torch.float32, Execution())[0]


def adapter(scorable: Scorable, max_length: int = 32, batch_size: int = 3) -> HarnessModel:
    return HarnessModel(scorable, batch_size, max_length, CPU)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in arguments]


@torch.no_grad()
def naive(trained: Path, ids: list[int], count: int, max_length: int) -> tuple[float, bool]:
    """The last `count` tokens, each predicted alone in fp64 from the window that ends with all."""
    model = checkpoint.load_model(checkpoint.resolve(trained), CPU, torch.float64)
    ids = ids[-(max_length + 1) :]
    total, greedy = 0.0, True
    for target in range(len(ids) - count, len(ids)):
        found = model(torch.tensor([ids[:target]]))[0, -1].double().log_softmax(-1)
        total += float(found[ids[target]])
        greedy &= int(found.argmax()) == ids[target]
    return total, greedy


PAIRS = [
    ("A context", " and what follows"),
    ("", "no context at all"),
    ("with a space ", "moved over"),
    ("A long context that is cut at its beginning " * 8, " end"),
    ("x", "y"),
]


def test_log_likelihoods_are_those_of_a_naive_count(scorable: Scorable, trained: Path):
    model = adapter(scorable)
    found = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    tokenizer = scorable.tokenizer
    for (context, continuation), (nats, greedy) in zip(PAIRS, found, strict=True):
        whole = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
        before = len(tokenizer.encode(context.rstrip())) + 1
        expected = naive(trained, whole, len(whole) - before, 32)
        assert nats == pytest.approx(expected[0], rel=1e-5)
        assert greedy == expected[1]
    alone = adapter(scorable, batch_size=1).loglikelihood(requests(*PAIRS), disable_tqdm=True)
    assert [nats for nats, _ in alone] == pytest.approx([nats for nats, _ in found], rel=1e-6)


def test_greedy_continuations_are_known_as_such(scorable: Scorable):
    ids = scorable.tokenizer.encode_document("A context")
    following = list(scorable.greedy(ids, 4))
    model = adapter(scorable)
    other = [*following[:-1], (following[-1] + 1) % 300]
    found = model._loglikelihood_tokens([(None, ids, following), (None, ids, other)], True)
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_is_what_perplexity_sums(scorable: Scorable, prepared: Path):
    texts = ["One text.", "A longer text, over several windows of the model. " * 6, "x"]
    tokenizer = PreparedData.open(prepared).tokenizer
    found = adapter(scorable).loglikelihood_rolling(
        requests(*[(text,) for text in texts]), disable_tqdm=True
    )
    for text, nats in zip(texts, found, strict=True):
        stream = TokenStream.from_documents([text], tokenizer)
        expected = score(
            scorable.token_losses, stream, None, seq_len=32, per_document=True, device=CPU
        )
        assert -nats == pytest.approx(expected.nats, rel=1e-6)


def test_texts_end_at_a_stop_string(scorable: Scorable):
    model = adapter(scorable, max_length=64)
    context = "A context"
    whole = model.generate_until(
        requests((context, {"until": [], "max_gen_toks": 12})), disable_tqdm=True
    )[0]
    ids = scorable.tokenizer.encode_document(context)
    assert whole == scorable.tokenizer.decode(scorable.greedy(ids, 12))
    stop = whole[3:5]
    cut = model.generate_until(
        requests((context, {"until": ["never", stop], "max_gen_toks": 12})), disable_tqdm=True
    )[0]
    assert cut == whole[: whole.find(stop)]
    with pytest.raises(InputError, match="only greedy"):
        model.generate_until(requests((context, {"do_sample": True})), disable_tqdm=True)


def test_all_local_tasks_run_without_a_network(
    run: Callable[..., dict[str, Any]], trained: Path, task_data: Path, scorable: Scorable,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    found = run("--checkpoint", trained, "--task_data", task_data)
    assert set(found["results"]) == set(ROWS) == set(local.names())
    assert all(found["questions"][name] == 2 for name in ROWS)
    model = adapter(scorable, max_length=64)
    # Counted by hand: the sentence with the greater log-likelihood is taken.
    right = []
    for row in ROWS["blimp"]:
        good, bad = model.loglikelihood(
            requests(("", row["sentence_good"]), ("", row["sentence_bad"])), disable_tqdm=True
        )
        right.append(float(good[0] > bad[0]))
    assert found["results"]["blimp"]["acc"] == sum(right) / 2
    assert found["by"]["blimp"] == dict(zip(("one", "two"), right, strict=True))
    row = ROWS["winogrande"][0]
    ends = [
        (f"Ann saw Bea as {option}", " was late.") for option in (row["option1"], row["option2"])
    ]
    first, second = model.loglikelihood(requests(*ends), disable_tqdm=True)
    other = ROWS["winogrande"][1]
    ends = [(f"The cup fell off the box as {o}", " was small.") for o in ("cup", "box")]
    third, fourth = model.loglikelihood(requests(*ends), disable_tqdm=True)
    correct = (second[0] > first[0]) + (third[0] > fourth[0])
    assert found["results"]["winogrande"]["acc"] == correct / 2, other
    assert "commonsense_qa" in capsys.readouterr().out


def test_a_cache_answers_in_place_of_the_model(
    run: Callable[..., dict[str, Any]], trained: Path, task_data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    options = ["--checkpoint", trained, "--task_data", task_data, "--tasks", "sciq", "boolq"]
    options += ["--cache", tmp_path / "answers"]
    first = run(*options)

    def never(*_: Any) -> Any:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(HarnessModel, "_score", never)
    assert run(*options)["results"] == first["results"]


def test_several_ranks_are_refused(
    run: Callable[..., dict[str, Any]], trained: Path, task_data: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="runs in one process"):
        run("--checkpoint", trained, "--task_data", task_data)


def test_a_model_of_hugging_face_scores_as_lm_evals_own_backend(
    run: Callable[..., dict[str, Any]], tmp_path: Path, task_data: Path
):
    """The same tasks, the same folder, their code instead of ours."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["some words, some other words"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")
    fast.save_pretrained(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(vocab_size=len(fast), initializer_range=0.3, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    names = ["hellaswag", "arc_easy", "boolq", "sciq", "commonsense_qa"]
    found = run("--checkpoint", f"hf:{tmp_path}", "--task_data", task_data, "--tasks", *names)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path), device="cpu", dtype="float32", max_length=128),
        tasks=[local.load(name, task_data) for name in names],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    for name in names:
        for metric, value in theirs["results"][name].items():
            if metric.endswith(("acc,none", "acc_norm,none")):
                assert found["results"][name][metric.removesuffix(",none")] == value, name
    # Accuracies of two questions say little: the numbers behind them.
    ours = HarnessModel(load(f"hf:{tmp_path}", CPU, torch.float32, Execution())[0], 4, 128, CPU)
    for name in names:
        for sample in theirs["samples"][name]:
            pairs = (
                [tuple(one.values()) for one in sample["arguments"]]
                if isinstance(sample["arguments"][0], dict)
                else [tuple(one) for one in sample["arguments"]]
            )
            mine = ours.loglikelihood(requests(*pairs), disable_tqdm=True)
            expected = [float(one[0][0]) for one in sample["resps"]]
            assert [nats for nats, _ in mine] == pytest.approx(expected, rel=1e-4), name


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--tasks: name at least one"),
        (["--task_data", "nowhere"], "--task_data nowhere: no such folder"),
        (["--task_data", "EMPTY"], "has a folder for none of"),
        (["--task_data", "DATA", "--tasks", "blimp", "no_such_task"], "no_such_task: lm-eval"),
        (["--task_data", "BROKEN", "--tasks", "blimp"], "line 1 has no sentence_bad, UID"),
        (["--task_data", "BROKEN", "--tasks", "sciq"], "line 1 is not JSON"),
        (["--task_data", "BROKEN", "--tasks", "boolq"], "no .jsonl file in it for task boolq"),
        (["--task_data", "DATA", "--limit", "0"], "--limit: 0"),
        (["--task_data", "DATA", "--max_length", "65"], "--max_length: 65 is over"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str], expected: str, run: Callable[..., dict[str, Any]], trained: Path,
    task_data: Path, tmp_path: Path,
):  # fmt: skip
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    for name, text in (("blimp", '{"sentence_good": "a"}\n'), ("sciq", "{\n"), ("boolq", None)):
        (broken / name).mkdir(parents=True)
        if text is not None:
            (broken / name / "test.jsonl").write_text(text)
    names = {"DATA": task_data, "EMPTY": tmp_path / "empty", "BROKEN": broken}
    with pytest.raises(InputError) as caught:
        run("--checkpoint", trained, *[names.get(a, a) for a in arguments])
    assert expected in str(caught.value)


def test_the_file_of_a_task_is_the_test_split_first(tmp_path: Path):
    (tmp_path / "blimp").mkdir()
    for split in ("train", "validation"):
        row = {**ROWS["blimp"][0], "UID": split}
        (tmp_path / "blimp" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    read = local.load("blimp", tmp_path)["custom_dataset"]
    assert read()["test"][0]["UID"] == "validation"
    (tmp_path / "blimp" / "test.jsonl").write_text(json.dumps(ROWS["blimp"][1]) + "\n")
    assert local.load("blimp", tmp_path)["custom_dataset"]()["test"][0]["UID"] == "two"

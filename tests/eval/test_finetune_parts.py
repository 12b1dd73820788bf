"""Metrics, splits, ids, padding, pooling and configuration of the fine-tuning."""

import json
import lzma
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.command_line import parse_options
from data.errors import InputError
from data.tokenizer import Tokenizer
from eval.finetune import metrics
from eval.finetune.backbones import Backbone
from eval.finetune.blocks import TextConfig, TuningConfig
from eval.finetune.config import TUNE_FOLDER, TuneConfig
from eval.finetune.grid import GridConfig, planned
from eval.finetune.heads import TaskModel, run
from eval.finetune.reading import Example, permutation, read, read_splits
from eval.finetune.results import mean_sd
from eval.finetune.setup import stage_schedule, standardised
from eval.finetune.sparsity import prune_in_place
from eval.finetune.tasks import GLUE, Task, find_task
from eval.finetune.texts import (
    IGNORED,
    Encoded,
    Encoder,
    TrainingOrder,
    collate,
    cut,
    targets,
)
from model import ModelConfig, Transformer, init_weights
from model.delta import Deltas, SoraConfig, config_from_dict
from training.schedule import learning_rate

GRIDS = {
    TUNE_FOLDER / name
    for name in ("small_study.yaml", "small_stages.yaml", "small_one_thread.yaml")
}
CONFIGS = sorted({*TUNE_FOLDER.glob("*.yaml")} - GRIDS)
GLUE_DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
CPU = torch.device("cpu")


# --- metrics -------------------------------------------------------------------------------------


def numbers(name: str, predictions: list[float], labels: list[float]) -> float:
    return metrics._OF_NUMBERS[name](np.array(predictions), np.array(labels))


def test_metrics_equal_what_a_hand_computes():
    # 3 true positives, 1 false positive, 2 false negatives, 2 true negatives.
    labels = [1, 1, 1, 1, 1, 0, 0, 0]
    found = [1, 1, 1, 0, 0, 1, 0, 0]
    assert numbers("accuracy", found, labels) == 5 / 8
    assert numbers("f1", found, labels) == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    expected = (3 * 2 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (2 + 1) * (2 + 2))
    assert numbers("matthews", found, labels) == pytest.approx(expected)


def test_correlations_equal_what_a_hand_computes():
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-2, -1, 3, 0): 4.5 / sqrt(5 · 14).
    assert numbers("pearson", [1, 2, 3, 4], [1, 2, 6, 3]) == pytest.approx(5 / math.sqrt(5 * 14))
    # Ranks 1 2 4 3: 1 - 6 · (1 + 1) / (4 · 15).
    assert numbers("spearman", [1, 2, 3, 4], [1, 2, 60, 3]) == pytest.approx(1 - 12 / 60)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_constant_predictions_have_no_correlation(name: str):
    assert numbers(name, [1, 1, 1, 1], [0, 1, 1, 0]) == 0.0


def test_f1_without_a_positive_is_zero():
    assert numbers("f1", [0, 0], [0, 0]) == 0.0


def test_texts_are_compared():
    assert metrics.exact_match(["The  Cat.", "a dog"], ["cat", "dogs"]) == 0.5
    assert metrics.rouge("rougeL", ["the cat sat"], ["the cat"]) == pytest.approx(2 * 2 / (3 + 2))
    assert metrics.bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(
        100
    )


def test_seeds_are_summarised_by_the_sample_deviation():
    found = mean_sd([1.0, 2.0, 6.0])
    assert (found["mean"], found["sd"]) == (3.0, pytest.approx(math.sqrt(14 / 2)))
    assert found["by_seed"] == [1.0, 2.0, 6.0]
    assert mean_sd([1.0]) == {"mean": 1.0, "sd": None, "by_seed": [1.0]}


# --- splits --------------------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, Any]]:
    return [{"sentence": f"text {i}", "label": i % 2} for i in range(count)]


def write(folder: Path, task: str, **splits: list[Any]) -> None:
    (folder / task).mkdir()
    for split, lines in splits.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with lzma.open(folder / task / f"{split}.jsonl.xz", "wt") as file:
            file.write(text)


def test_small_sets_halve_dev_and_large_ones_take_a_thousand_of_train(tmp_path: Path):
    write(tmp_path, "cola", train=rows(30), dev=rows(21))
    write(tmp_path, "sst2", train=rows(1030), dev=rows(21))
    small, large = (read_splits(GLUE[name], str(tmp_path)) for name in ("cola", "sst2"))
    assert [len(part) for part in (small.train, small.val, small.test)] == [30, 10, 11]
    assert [len(part) for part in (large.train, large.val, large.test)] == [30, 1000, 21]
    assert {one.texts for one in small.val + small.test} == {(f"text {i}",) for i in range(21)}
    assert {one.texts for one in large.val + large.train} == {(f"text {i}",) for i in range(1030)}
    assert [one.texts[0] for one in large.test] == [f"text {i}" for i in range(21)]
    # torch.randperm(21) from a generator with the seed 42: the protocol is fixed by its result.
    order = torch.randperm(21, generator=torch.Generator().manual_seed(42)).tolist()
    assert [one.texts[0] for one in small.val] == [f"text {i}" for i in order[:10]]
    assert read_splits(GLUE["cola"], str(tmp_path)) == small


def test_the_permutation_never_changes():
    assert permutation(8) == [6, 3, 0, 7, 2, 1, 4, 5]


@pytest.mark.skipif(not GLUE_DATA.is_dir(), reason="GLUE's files are not here")
@pytest.mark.parametrize(
    ("task", "sizes"),
    [
        ("rte", (2490, 138, 139)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("cola", (8551, 521, 522)), ("stsb", (5749, 750, 750)), ("mrpc", (3668, 204, 204)),
                ("mnli", (8999, 500, 500)), ("qnli", (8999, 1000, 5463)),
                ("sst2", (66349, 1000, 872)),
            )
        ),
    ],
)  # fmt: skip
def test_glue_is_read(task: str, sizes: tuple[int, ...]):
    found = read_splits(GLUE[task], str(GLUE_DATA))
    assert (len(found.train), len(found.val), len(found.test)) == sizes


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "it is empty"),
        ([{"sentence": "a"}], "row 1 has no column label; it has sentence"),
        (
            [{"sentence": "a", "label": 0}, {"sentence": "a", "label": 2}],
            "row 2: label is 2",
        ),
        ([{"sentence": "a", "label": -1}], "label is -1; allowed are classes 0 to 1"),
        ([{"sentence": "a", "label": "yes"}], "label is 'yes'"),
        ([{"sentence": "a", "label": float("nan")}], "label is nan; allowed are classes 0 to 1"),
        ([{"sentence": "a", "label": float("inf")}], "label is inf"),
        ([{"sentence": None, "label": 1}], "sentence is None; a text is expected"),
        ([[1]], "row 1 is list"),
    ],
)
def test_wrong_examples_are_named(tmp_path: Path, lines: list[Any], message: str):
    write(tmp_path, "cola", train=lines)
    with pytest.raises(InputError, match=message):
        read(GLUE["cola"], str(tmp_path), "train")


def test_what_is_not_there_or_no_json_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"cola: no file train\.jsonl"):
        read(GLUE["cola"], str(tmp_path), "train")
    (tmp_path / "cola").mkdir()
    (tmp_path / "cola" / "train.jsonl").write_text('{"sentence": "a", "label": 1}\n{"sen')
    with pytest.raises(InputError, match="row 2 is not JSON"):
        read(GLUE["cola"], str(tmp_path), "train")
    (tmp_path / "cola" / "train.jsonl.gz").write_bytes(b"")
    with pytest.raises(InputError, match="one file of cola train is allowed"):
        read(GLUE["cola"], str(tmp_path), "train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "ranking"}, r"define\.mine\.kind: 'ranking'"),
        ({"kind": ["lm"]}, r"define\.mine\.kind: \['lm'\]"),
        ({"metrics": [["f1"]]}, r"define\.mine\.metrics: \[\['f1'\]\]"),
        ({"columns": "sentence"}, r"define\.mine\.columns: 'sentence'"),
        ({"max_new_tokens": "8"}, r"define\.mine\.max_new_tokens: '8'"),
        ({"kind": "lm", "prompt": "{q"}, r"prompt: '\{q'.*a brace of the text itself is doubled"),
        *(
            ({"kind": "lm", "prompt": prompt}, "the name of a column, and nothing else")
            for prompt in ("{} {q}", "{0}", "{q.x}", "{q[0]}", "{q!r}", "{q:d}", "{q:{w}}", "{q!x}")
        ),
        ({"classes": 1}, "at least 2"),
        ({"metrics": ["pearson"]}, "allowed is accuracy, f1, matthews"),
        ({"classes": 3, "metrics": ["f1"]}, "2, for F1"),
        ({"kind": "lm"}, r"prompt: ''; allowed is a text with"),
        ({"colums": ["a"]}, "colums; known are kind, columns"),
        ("cola", "cola; known are"),
    ],
)
def test_wrong_definitions_are_named(fields: Any, message: str):
    with pytest.raises(ValueError, match=message):
        find_task("mine", {"mine": fields})


def test_numbers_are_standardised_by_the_training_split():
    from eval.finetune.reading import Splits

    def some(*values: float) -> list[Example]:
        return [Example(("a",), value) for value in values]

    found = standardised(Splits(some(1.0, 3.0), some(2.0), some(5.0)))
    assert [one.label for one in found.train + found.val + found.test] == [-1.0, 1.0, 0.0, 3.0]


# --- ids -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Tokenizer:
    return Tokenizer(prepared / "tokenizer.model")


def test_a_pair_is_bos_first_separator_second_end(tokenizer: Tokenizer):
    encoder = Encoder(tokenizer, TextConfig(40, " | ", "\n"), 64)
    a, b, between, end = (tokenizer.encode(text) for text in ("one", "two", " | ", "\n"))
    assert encoder.encode(Example(("one", "two"), 1)).ids == [1, *a, *between, *b, *end]
    assert encoder.encode(Example(("one",), 1)).ids == [1, *a, *end]


def test_the_longer_text_of_a_pair_is_cut_first(tokenizer: Tokenizer):
    assert cut([[1, 2, 3, 4, 5, 6], [7, 8]], 5) == [[1, 2, 3], [7, 8]]
    assert cut([[1, 2, 3, 4], [5, 6, 7, 8]], 5) == [[1, 2], [5, 6, 7]]
    encoder = Encoder(tokenizer, TextConfig(12, "\n", "\n"), 64)
    end = tokenizer.encode("\n")
    found = encoder.encode(Example(("a b c d e f g h i j k", "x"), 0)).ids
    assert len(found) == 12
    assert found[-len(end) :] == end


def test_lengths_that_do_not_fit_are_refused(tokenizer: Tokenizer):
    with pytest.raises(InputError, match=r"texts\.max_length: 128 is over the backbone's 64"):
        Encoder(tokenizer, TextConfig(128), 64)
    with pytest.raises(InputError, match="BOS, separator and end take"):
        Encoder(tokenizer, TextConfig(8, "a long separator", "end"), 64)
    with pytest.raises(InputError, match=r"the backbone's 56 positions without the 8 of the soft"):
        Encoder(tokenizer, TextConfig(60), 64, taken=8)
    encoder = Encoder(tokenizer, TextConfig(40), 64, taken=8)
    assert encoder.prompt_room(16) == 39
    with pytest.raises(InputError, match=r"max_new_tokens: 55; with BOS and a prompt"):
        encoder.prompt_room(55)


def test_the_loss_is_of_the_answer_alone(tokenizer: Tokenizer):
    encoder = Encoder(tokenizer, TextConfig(40), 64)
    prompt, answer = tokenizer.encode("one two: "), tokenizer.encode("three") + encoder.end
    row = encoder.encode_answer(Example(("one two: ",), "three"))
    assert row.ids == [1, *prompt, *answer]
    found = targets([row], len(row.ids) + 3)[0].tolist()
    # The last id of the prompt predicts the first of the answer; the last id predicts nothing.
    assert found == [*[IGNORED] * len(prompt), *answer, *[IGNORED] * 4]


def test_the_loss_of_answers_equals_a_sum_by_hand(tokenizer: Tokenizer):
    backbone = small(tokenizer)
    encoder = Encoder(tokenizer, TextConfig(40), 64)
    examples = [Example(("one two: ",), "three"), Example(("a: ",), "b")]
    encoded = [encoder.encode_answer(one) for one in examples]
    model = TaskModel(backbone, Task("mine", "lm", prompt="{a}"), 0)
    losses = run(model, collate(encoded, CPU)).detach()
    for row, found in zip(encoded, losses, strict=True):
        logits = backbone.module(torch.tensor([row.ids]))[0].detach()
        logprobs = torch.log_softmax(logits, dim=-1)
        first = len(row.ids) - row.answer
        by_hand = -sum(float(logprobs[i - 1, row.ids[i]]) for i in range(first, len(row.ids)))
        assert float(found.sum()) == pytest.approx(by_hand, rel=1e-5)


def test_each_epoch_has_each_example_once_in_another_order():
    seven = [Encoded([1], 0)] * 7
    order = TrainingOrder(seven, 3)
    first, second = order.indices(0, 7), order.indices(7, 7)
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second
    assert TrainingOrder(seven, 3).indices(5, 6) == first[5:] + second[:4]
    assert TrainingOrder(seven, 4).indices(0, 7) != first


def test_batches_of_like_length_pad_less_and_lose_nothing():
    draw = np.random.default_rng(0)
    texts = [Encoded([1] * int(size), 0) for size in draw.integers(2, 60, size=130)]
    plain, grouped = TrainingOrder(texts, 3), TrainingOrder(texts, 3, group=8)

    def padded(order: TrainingOrder) -> int:
        steps = [order.indices(first, 8) for first in range(0, 128, 8)]
        return sum(8 * max(len(texts[i].ids) for i in step) for step in steps)

    assert sorted(grouped.indices(0, 130)) == list(range(130))
    assert padded(grouped) < 0.8 * padded(plain)
    means = [np.mean([len(texts[i].ids) for i in grouped.indices(8 * k, 8)]) for k in range(16)]
    assert means != sorted(means)
    assert TrainingOrder(texts, 3, group=8).indices(100, 60) == grouped.indices(100, 60)


# --- padding and pooling -------------------------------------------------------------------------


def small(tokenizer: Tokenizer) -> Backbone:
    config = ModelConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
        max_seq_len=64, r=8, init="authors",
    )  # fmt: skip
    module = Transformer(config).eval()
    init_weights(module, 3)
    return Backbone(module, tokenizer, 32, 64, "lm_head", {})


ROWS = [Encoded([1, 5, 9, 0, 0, 7], 0), Encoded([1, 0, 11], 1), Encoded([1, 30, 0], 1)]


def test_padding_changes_no_bit_of_the_outputs(tokenizer: Tokenizer):
    """Whatever id stands there."""
    model = TaskModel(small(tokenizer), GLUE["cola"], 0)
    deltas = Deltas(model.backbone)
    deltas.add("tuned", config_from_dict({"method": "lora", "targets": ["q_proj", "v_proj"]}))
    with torch.no_grad():
        for _, layer in deltas["tuned"].named_layers():
            layer.B.normal_()
        outputs = [run(model, collate(ROWS, CPU, pad_id=pad)) for pad in (0, 1, 7, 399)]
    assert all(torch.equal(outputs[0], one) for one in outputs)


@pytest.mark.parametrize("longest", [7, 16, 33, 64])
def test_a_longer_row_in_the_batch_does_not_matter(tokenizer: Tokenizer, longest: int):
    """But for rounding: matrix products of another size add in another order."""
    model = TaskModel(small(tokenizer), GLUE["cola"], 0)
    extra = Encoded([1, *[8] * (longest - 1)], 0)
    with torch.no_grad():
        alone = run(model, collate([*ROWS, Encoded([1, 8], 0)], CPU))
        beside = run(model, collate([*ROWS, extra], CPU))
    torch.testing.assert_close(alone[:3], beside[:3], rtol=1e-5, atol=1e-6)


def test_the_last_real_token_is_read_also_where_pad_ids_are_in_the_text(tokenizer: Tokenizer):
    """Id 0, which pads, inside of a text and at its end (defect D4 of the authors' classifier)."""
    backbone = small(tokenizer)
    model = TaskModel(backbone, GLUE["cola"], 0)
    assert model.head is not None
    with torch.no_grad():
        found = run(model, collate(ROWS, CPU))
        for row, output in zip(ROWS, found, strict=True):
            states = backbone.module(torch.tensor([row.ids]))  # its head is taken off
            torch.testing.assert_close(output, model.head.weight @ states[0, -1])


def test_the_head_is_float32_without_bias(tokenizer: Tokenizer):
    model = TaskModel(small(tokenizer), GLUE["mnli"], 0)
    assert model.head is not None
    assert model.head.bias is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert run(model, collate(ROWS, CPU)).dtype == torch.float32
        states = torch.randn(2, 32)
        found = model.head(states)
    assert torch.equal(found, torch.nn.functional.linear(states, model.head.weight))


# --- configuration -------------------------------------------------------------------------------


def parse(*options: str) -> TuneConfig:
    base = ["--backbone", "b", "--run_dir", "r", "--tasks", "rte", "--delta", '{"method": "lora"}']
    return parse_options(TuneConfig, [*base, *options], prog="test", description="")[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--delta", '{"method": "lorra"}'], r"delta\.method: 'lorra'; allowed are adapter"),
        (["--delta", '{"method": "lora", "rr": 1}'], "unknown key 'rr'"),
        (["--delta", '{"method": "head", "r": 1}'], "method head takes no other field"),
        (["--delta", '{"method": "peft"}'], r"delta\.peft_type"),
        *(
            (
                ["--delta", f'{{"method": "peft", "peft_type": "CPT", {wrong}}}'],
                r"delta\.(num_virtual_tokens|cpt_token_ids): .*allowed is",
            )
            for wrong in (
                '"num_virtual_tokens": "ten"',
                '"num_virtual_tokens": -40',
                '"cpt_token_ids": 5',
            )
        ),
        (["--tuning.epochs", "0"], r"tuning\.epochs: 0.*greater than 0"),
        (["--tuning.warmup_ratio", "1"], "0 to under 1"),
        (["--seeds", "[1, 1]"], "each once"),
        (["--sparsity.strength", "1"], "has no gates; use sora"),
        (["--overrides", '{"cola": {}}'], "cola is none of tasks rte"),
        (["--overrides", '{"rte": {"epoch": 1}}'], "epoch; known are"),
        (["--overrides", '{"rte": {"epochs": -1}}'], r"tuning\.epochs: -1"),
        (["--overrides", '{"rte": {"precision": "fp16"}}'], r"overrides\.rte\.precision: 'fp16'"),
        (["--overrides", '{"rte": {"batch_size": 2.5}}'], r"overrides\.rte\.batch_size: 2\.5"),
        (["--delta", '{"method": ["lora"]}'], r"delta\.method: \['lora'\]; a name is expected"),
        (["--texts.max_length", "4"], r"texts\.max_length: 4"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], message: str):
    with pytest.raises(InputError, match=message):
        parse(*options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--sparsity.prune_every", "5", "--deepspeed.zero_stage", "1"],
            "allowed is 0",
        ),
        (["--sparsity.l1", "1", "--deepspeed.zero_stage", "3"], "ZeRO stage 3"),
        (["--sparsity.stages", "3"], r"sparsity\.last_strength"),
        (["--sparsity.stages", "2", "--sparsity.last_strength", "0"], "first <= last"),
        (["--sparsity.strength", "-1"], "at least 0"),
        (["--sparsity.strength", ".inf"], r"sparsity\.strength: inf"),
        (["--sparsity.stages", "2", "--sparsity.last_strength", ".inf"], r"last_strength: inf"),
        (["--freeze_delta", "true"], "sparsity: freeze_delta is true"),
    ],
)
def test_wrong_sparsity_is_one_line(options: list[str], message: str):
    first = ["--delta", '{"method": "sora"}', "--sparsity.strength", "1"]
    with pytest.raises(InputError, match=message):
        parse(*first, *options)


def test_the_resolved_yaml_reads_back_equal(tmp_path: Path):
    config = parse("--overrides", '{"rte": {"epochs": 2}}', "--seeds", "[3, 4]")
    assert config.tuning_of("rte").epochs == 2
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert (
        parse_options(
            TuneConfig, ["--config", str(tmp_path / "c.yaml")], prog="test", description=""
        )[0]
        == config
    )


def test_each_stage_has_a_schedule_of_its_own():
    """The authors' code trains with the rate 0 after the first stage."""
    options = ["--delta", '{"method": "sora"}', "--sparsity.stages", "3"]
    config = parse(*options, "--sparsity.last_strength", "1", "--sparsity.stage_epochs", "2")
    tuning = TuningConfig(epochs=5, batch_size=10, learning_rate=0.5, warmup_ratio=0.1)
    stages = [stage_schedule(config, tuning, 100, stage, 0) for stage in range(3)]
    assert [one.max_steps for one in stages] == [50, 20, 20]
    for one in stages:
        rates = [learning_rate(one, step) for step in range(one.max_steps)]
        assert max(rates) == 0.5
        assert rates[0] < 0.3
        assert 0 < rates[-1] < 0.05


def test_pruning_forgets_layers_without_ranks(tokenizer: Tokenizer):
    """Their parameters leave the optimizer, and the configuration builds what is left."""
    backbone = small(tokenizer).module
    deltas = Deltas(backbone)
    delta = deltas.add("tuned", SoraConfig(["q_proj", "v_proj"], r=4))
    names = [name for name, _ in delta.named_layers()]
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1)
    ids = torch.tensor([[1, 2, 3]])
    backbone(ids).sum().backward()
    optimizer.step()
    with torch.no_grad():
        delta.layer(names[0]).gate.zero_()
        delta.layer(names[1]).gate[:3] = 0
        before = backbone(ids)
    assert prune_in_place(delta, optimizer) == 7
    with torch.no_grad():
        torch.testing.assert_close(backbone(ids), before)
    assert [name for name, _ in delta.named_layers()] == names[1:]
    left = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert left == {id(p) for p in delta.parameters()}
    again = config_from_dict(json.loads(json.dumps(delta.config.to_dict())))
    rebuilt = again.build(backbone, again.find(backbone))
    rebuilt.load_state_dict(delta.state_dict())
    scales = [layer.scale for _, layer in delta.named_layers()]
    assert [layer.scale for _, layer in rebuilt.named_layers()] == scales == [4.0] * 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configurations_are_read(path: Path):
    config, _ = parse_options(
        TuneConfig, ["--config", path.stem], prog="test", description="", config_folder=TUNE_FOLDER
    )
    assert all(find_task(task, config.define) for task in config.tasks)


@pytest.mark.parametrize(
    ("name", "count"),
    [("small_study", 2 * 8 * 4 * 3), ("small_stages", 12), ("small_one_thread", 8)],
)
def test_the_grids_are_read(name: str, count: int):
    grid, _ = parse_options(
        GridConfig,
        ["--config", name],
        prog="test",
        description="",
        config_folder=TUNE_FOLDER,
    )
    runs = [(backbone, method, task, seed) for backbone, method, _, task, seed in planned(grid)]
    assert len(runs) == len(set(runs)) == count

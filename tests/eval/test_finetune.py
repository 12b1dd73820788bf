"""Fine-tuning from end to end, in this process: methods, resume, sparsity, bad input."""

import dataclasses
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from data.errors import InputError
from data.shards import sha256_file
from eval.finetune import loop, table
from eval.finetune.blocks import SparsityConfig, TextConfig, TuningConfig
from eval.finetune.config import TuneConfig
from eval.finetune.reading import read_splits
from eval.finetune.run import run_all, run_one
from eval.finetune.setup import setup
from model import ModelConfig, Transformer, init_weights
from model.delta import Deltas
from model.delta.files import load_delta
from training import checkpoint, distributed
from training.signals import StopSignal

WORDS = ["the", "of", "and", "module", "for", "with", "is", "not"]
LORA = {"method": "lora", "r": 4, "targets": ["q_proj", "v_proj"]}
SORA = {**LORA, "method": "sora"}


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """The device of a process with one rank; environment and signals are as before afterwards."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (15, 2, 10)}
    yield distributed.init_distributed()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A checkpoint of an untrained LPA model."""
    folder = tmp_path_factory.mktemp("backbone")
    config = ModelConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2,
        max_seq_len=64, r=8, init="authors",
    )  # fmt: skip
    model = Transformer(config)
    init_weights(model, 1)
    config.to_json(folder / "model.json")
    shutil.copy(prepared / "tokenizer.model", folder)
    safetensors.torch.save_file(dict(model.state_dict()), folder / "model.safetensors")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in folder.iterdir()
    }
    sums = {"tokenizer_sha256": files["tokenizer.model"]["sha256"], "seq_len": 64, "step": 0}
    state = {"format_version": checkpoint.FORMAT_VERSION, **sums, "tokens": 0, "files": files}
    checkpoint.write_state(folder, state)
    return folder


def write_task(folder: Path, name: str, rows: dict[str, list[dict[str, Any]]]) -> None:
    (folder / name).mkdir(parents=True)
    for split, lines in rows.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / name / f"{split}.jsonl").write_text(text)


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of two classes, which their last word tells."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.randrange(2)
        words = [draw.choice(WORDS) for _ in range(draw.randrange(2, 7))]
        rows.append({"text": " ".join([*words, ["yes", "zero"][label]]), "label": label})
    return rows


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A separable task, a regression on the same texts, and one whose answer is a text."""
    folder = tmp_path_factory.mktemp("tasks")
    train, dev = sentences(96, 0), sentences(64, 1)
    write_task(folder, "words", {"train": train, "dev": dev})
    numbers = [[row | {"label": 2.5 * row["label"]} for row in rows] for rows in (train, dev)]
    write_task(folder, "numbers", {"train": numbers[0], "dev": numbers[1]})
    answers = [
        [{"question": row["text"], "answer": "ab" if row["label"] else "c"} for row in rows]
        for rows in (train, dev[:8])
    ]
    write_task(folder, "answers", {"train": answers[0], "dev": answers[1]})
    return folder


DEFINE = {
    "words": {"columns": ["text"]},
    "numbers": {"kind": "regression", "columns": ["text"]},
    "answers": {
        "kind": "lm", "prompt": "{question}: ", "label": "answer", "max_new_tokens": 6,
        "metrics": ["exact_match", "rougeL", "bleu"],
    },
}  # fmt: skip


@pytest.fixture
def make(backbone: Path, tasks: Path, tmp_path: Path) -> Any:
    """Configurations of short runs."""

    def config(delta: dict[str, Any], name: str = "run", **changes: Any) -> TuneConfig:
        tuning = {"epochs": 4.0, "batch_size": 16, "learning_rate": 1e-2, "log_every": 3}
        tuning |= {"evals_per_epoch": 1} | changes.pop("tuning", {})
        fields: dict[str, Any] = {
            "backbone": str(backbone),
            "run_dir": str(tmp_path / name),
            "delta": delta,
            "tasks": ["words"],
            "data": str(tasks),
            "define": DEFINE,
            "texts": TextConfig(max_length=40, end=""),
            "tuning": TuningConfig(**tuning),
        }
        return TuneConfig(**(fields | changes))

    return config


def result(config: TuneConfig, task: str = "words", seed: int = 0) -> dict[str, Any]:
    return json.loads((config.folder(task, seed) / "result.json").read_text())


METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "sora": SORA,
    "tied_lora": {**LORA, "method": "tied_lora"},
    "adapter": {"method": "adapter", "bottleneck_dim": 8},
    "bitfit": {"method": "bitfit"},
    "full": {"method": "full"},
    "head": {"method": "head"},
    "prefix": {"method": "prefix", "prefix_tokens": 3, "reparameterize": False},
    "soft_prompt": {"method": "soft_prompt", "soft_tokens": 4},
}


QUICK = ("lora", "sora", "full", "head")


@pytest.mark.parametrize(
    "method",
    [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in METHODS],
)
def test_a_separable_task_is_learnt(make: Any, device: torch.device, method: str):
    config = make(METHODS[method])
    assert run_all(config, device, StopSignal())
    found = result(config)
    assert found["test"]["accuracy"] >= 0.95
    counts = found["trained_parameters"]
    assert counts["total"] == counts["delta"] + counts["head"] + counts["backbone"]
    assert counts["head"] == 64
    assert (counts["delta"] > 0) == (method not in ("full", "head"))
    assert (counts["backbone"] > 0) == (method == "full")
    assert json.loads((config.folder("words", 0) / "status.json").read_text())["state"] == (
        "completed"
    )


def trained(config: TuneConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """The best state of a run."""
    path = config.folder("words", seed) / "best" / "trained.safetensors"
    return safetensors.torch.load_file(path)


SPARSE = SparsityConfig(strength=6.0, last_strength=12.0, stages=2, stage_epochs=2.0, prune_every=4)
RESUMED = {
    "lora": (LORA | {"dropout": 0.1}, {}),
    # With dropout, hooks of the delta before it was pruned would draw numbers of their own.
    "sora, pruned, in stages": (SORA | {"dropout": 0.1}, {"sparsity": SPARSE}),
    "full": ({"method": "full"}, {}),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name.startswith("sora") else pytest.param(name, marks=pytest.mark.slow)
        for name in RESUMED
    ],
)
def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(
    make: Any, device: torch.device, name: str
):
    """From a checkpoint in the middle, and from one that a signal left after the first step."""
    delta, changes = RESUMED[name]
    tuning = {"checkpoint_every": 7, "epochs": 3.0}
    whole, parts = (make(delta, at, tuning=tuning, **changes) for at in ("whole", "parts"))
    assert run_one(whole, "words", 0, device, StopSignal())
    stop = StopSignal()
    signal.raise_signal(signal.SIGTERM)
    assert not run_one(parts, "words", 0, device, stop)
    folder = parts.folder("words", 0)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000001"]
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
    assert run_one(parts, "words", 0, device, StopSignal())
    same(whole, parts)
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    (newest / "weights.safetensors").write_bytes(b"damaged")
    (folder / "result.json").unlink()
    assert run_one(parts, "words", 0, device, StopSignal())
    same(whole, parts)


def same(one: TuneConfig, other: TuneConfig) -> None:
    """All that two runs came to, but for seconds and memory."""
    a, b = trained(one), trained(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    left_out = {"seconds_training", "cpu_seconds_training", "peak_memory_bytes"}
    x, y = ({k: v for k, v in result(c).items() if k not in left_out} for c in (one, other))
    assert x == y


def test_gates_close_at_the_live_rate_and_stages_begin_anew(
    make: Any, device: torch.device, tmp_path: Path
):
    """λ closes gates, more in the second stage; the rate of each stage warms up and decays; ranks
    that closed are dropped from parameters; the compact LoRA has what is left.
    """
    tuning = {"epochs": 3.0, "log_every": 1, "learning_rate": 1e-2, "warmup_ratio": 0.25}
    config = make(SORA, sparsity=SPARSE, tuning=tuning)
    assert run_all(config, device, StopSignal())
    folder = config.folder("words", 0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(one["seconds_per_step"] > 0 and one["eta_seconds"] >= 0 for one in lines)
    rates = {stage: [one["lr"] for one in lines if one["stage"] == stage] for stage in (0, 1)}
    for stage, steps in ((0, 18), (1, 12)):
        assert len(rates[stage]) == steps
        assert max(rates[stage]) == pytest.approx(1e-2)
        assert rates[stage][0] < 5e-3
        assert 0 < rates[stage][-1] < 2e-3
    found = result(config)
    first, second = found["stages"]
    assert (first["strength"], second["strength"]) == (6.0, 12.0)
    assert 16 > first["ranks_kept"] > second["ranks_kept"]
    assert first["memorisation_percent"] == first["generalisation_percent"] == 100
    assert {"memorisation_percent", "generalisation_percent", "test"} <= set(second)
    output = tmp_path / "table.md"
    assert table.main([str(Path(config.run_dir).parent), "--output", str(output)]) == 0
    kept = [f"{one['ranks_kept']:.1f} of 16" for one in (first, second)]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in output.read_text().splitlines()
        if "words" in line and " of 16" in line
    ]
    share = f"{second['memorisation_percent']:.1f}"
    assert [line[2:6] for line in lines] == [
        ["0", "6", kept[0], "100.0"], ["1", "12", kept[1], share],
    ]  # fmt: skip
    numbers = json.loads(output.with_suffix(".json").read_text())["run"]["words"]
    assert numbers["stages"][1]["test"]["by_seed"] == [second["test"]]
    report = json.loads((folder / "ranks.json").read_text())
    assert report["ranks"] == 16
    assert report["ranks_kept"] == sum(one["kept"] for one in report["targets"])
    assert (folder / "ranks.png").stat().st_size > 1000
    after = found["after_pruning"]
    assert after["delta_parameters"] == 64 * report["ranks_kept"]  # A and B, gates folded
    assert after["total"] == after["delta_parameters"] + 64


def test_without_strength_no_gate_closes(make: Any, device: torch.device):
    config = make(SORA, tuning={"epochs": 1.0})
    assert run_all(config, device, StopSignal())
    assert result(config)["after_pruning"]["ranks_kept"] == 16


def test_the_authors_threshold_does_not_follow_the_rate(make: Any, device: torch.device):
    """One step without a gradient to speak of: g shrinks by λ itself, and not by η·λ."""
    moved = {}
    for compat in (False, True):
        sparsity = SparsityConfig(strength=0.25, reference_compat=compat)
        tuning = {"epochs": 1.0, "learning_rate": 1e-3, "warmup_ratio": 0.0}
        config = make(SORA, f"compat{compat}", sparsity=sparsity, tuning=tuning)
        config.folder("words", 0).mkdir(parents=True)
        job = setup(config, "words", 0, device)
        order = job.order()
        delta = job.engine.model.delta
        assert delta is not None
        layers = [layer for _, layer in delta.named_layers()]
        before = torch.cat([layer.gate.detach().clone() for layer in layers])
        loop._step(job, order)
        after = torch.cat([layer.gate.detach() for layer in layers])
        big = before.abs() > 0.6
        moved[compat] = float((before.abs() - after.abs())[big].mean())
        job.metrics.close()
    # Adam's first step is at most the rate, 0.001, either way; B is zero, so here it is nothing.
    assert moved[False] == pytest.approx(1e-3 * 0.25, rel=1e-2)
    assert moved[True] == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "sora", "bitfit", "head"])
def test_what_is_frozen_keeps_its_bits(
    make: Any, device: torch.device, backbone: Path, method: str
):
    config = make(METHODS[method], tuning={"epochs": 1.0, "weight_decay": 0.5})
    config.folder("words", 0).mkdir(parents=True)
    job = setup(config, "words", 0, device)
    assert loop.train(job, StopSignal())
    job.metrics.close()
    weights = safetensors.torch.load_file(backbone / "model.safetensors")
    now = job.engine.model.backbone.state_dict()
    assert set(weights) - set(now) == {"lm_head.weight"}
    assert all(torch.equal(value, weights[name]) for name, value in now.items())
    moments = {id(p) for group in job.engine.optimizer.param_groups for p in group["params"]}
    assert not moments & {id(p) for p in job.engine.model.backbone.parameters()}


def test_groups_and_their_rates(make: Any, device: torch.device):
    """Gates and vectors do not decay; the head has its own multiple of the rate."""
    config = make(SORA, tuning={"head_lr_multiplier": 3.0, "weight_decay": 0.1})
    config.folder("words", 0).mkdir(parents=True)
    job = setup(config, "words", 0, device)
    loop._step(job, job.order())
    job.metrics.close()
    groups = {group["name"]: group for group in job.engine.optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "gates": 0.0, "head": 0.1, "matrices": 0.1,
    }  # fmt: skip
    rate = job.engine.rate(0)
    assert groups["gates"]["lr"] == groups["matrices"]["lr"] == rate
    assert groups["head"]["lr"] == 3 * rate
    assert sum(p.numel() for p in groups["gates"]["params"]) == 16


def test_numbers_are_predicted(make: Any, device: torch.device):
    config = make(LORA, tasks=["numbers"])
    assert run_all(config, device, StopSignal())
    assert result(config, "numbers")["test"]["pearson"] > 0.95


def test_an_answer_is_written(make: Any, device: torch.device):
    texts, tuning = TextConfig(max_length=40), {"epochs": 10.0, "learning_rate": 1e-2}
    config = make({"method": "full"}, tasks=["answers"], texts=texts, tuning=tuning)
    assert run_all(config, device, StopSignal())
    test = result(config, "answers")["test"]
    assert test["exact_match"] == 1.0
    assert test["rougeL"] == 1.0
    assert result(config, "answers")["trained_parameters"]["head"] == 0


def test_seeds_differ_and_are_summarised(make: Any, device: torch.device):
    config = make({"method": "head"}, seeds=[0, 7], tuning={"epochs": 1.0, "learning_rate": 1e-4})
    assert run_all(config, device, StopSignal())
    a, b = (trained(config, seed)["head.weight"] for seed in (0, 7))
    assert not torch.equal(a, b)
    found = json.loads((Path(config.run_dir) / "words" / "result.json").read_text())
    values = [result(config, seed=seed)["test"]["accuracy"] for seed in (0, 7)]
    assert found["test"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    assert found["test"]["accuracy"]["sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


def test_patience_ends_a_run_early(make: Any, device: torch.device):
    tuning = {"epochs": 40.0, "patience": 2, "learning_rate": 1e-2, "checkpoint_every": 0}
    config = make({"method": "head"}, tuning=tuning)
    assert run_all(config, device, StopSignal())
    found = result(config)
    assert found["steps"] == found["best_step"] + 2 * 6


def test_losses_that_are_not_finite_end_a_run(make: Any, device: torch.device):
    tuning = {"max_skipped_steps": 3, "head_lr_multiplier": 1e38, "learning_rate": 1e30}
    config = make({"method": "head"}, tuning=tuning)
    with pytest.raises(InputError, match=r"3 steps in a row .* lower tuning\.learning_rate"):
        run_all(config, device, StopSignal())
    folder = config.folder("words", 0)
    assert json.loads((folder / "status.json").read_text())["state"] == "failed"
    assert len(json.loads((folder / "not_finite.json").read_text())["last_examples"]) == 16


def test_a_run_goes_on_with_what_it_began_with(make: Any, device: torch.device):
    config = make({"method": "head"}, tuning={"epochs": 1.0})
    assert run_all(config, device, StopSignal())
    assert run_all(config, device, StopSignal())  # its result is there: nothing is trained
    other = make({"method": "head"}, tuning={"epochs": 2.0})
    with pytest.raises(InputError, match=r"tuning was .* use another run_dir"):
        run_all(other, device, StopSignal())


def reseal(folder: Path, name: str) -> None:
    """The sum of a changed file in checkpoint.json, as who trains again writes it."""
    state, file = json.loads((folder / "checkpoint.json").read_text()), folder / name
    del state["sha256"]
    state["files"][name] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    checkpoint.write_state(folder, state)


def test_prompts_count_beyond_what_is_trained_on(
    make: Any, device: torch.device, tasks: Path, tmp_path: Path
):
    """texts.max_length cuts what is trained on; an answer is generated behind the whole prompt."""
    data = tmp_path / "data"
    shutil.copytree(tasks, data)
    texts = TextConfig(max_length=8)
    config = make(
        {"method": "head"}, tasks=["answers"], texts=texts, data=str(data), tuning={"epochs": 0.1}
    )
    assert run_all(config, device, StopSignal())
    path = data / "answers" / "dev.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["question"] = "zero zero zero " + row["question"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read_splits.cache_clear()  # of a process of its own
    with pytest.raises(InputError, match="data_sha256 was"):
        run_all(config, device, StopSignal())


def test_a_soft_prompt_writes_answers(make: Any, device: torch.device):
    """Its positions are in the cache too."""
    texts, tuning = TextConfig(max_length=40), {"epochs": 0.1}
    config = make(METHODS["soft_prompt"], tasks=["answers"], texts=texts, tuning=tuning)
    assert run_all(config, device, StopSignal())
    assert "exact_match" in result(config, "answers")["test"]


def test_a_save_that_was_killed_is_mended(make: Any, device: torch.device):
    """Between the two renames best/ is best.replaced; behind them, both are there."""
    config = make({"method": "head"}, tuning={"epochs": 2.0, "checkpoint_every": 6})
    assert run_one(config, "words", 0, device, StopSignal())
    folder = config.folder("words", 0)
    expected = trained(config)
    for both in (False, True):
        (folder / "result.json").unlink()
        if both:
            shutil.copytree(folder / "best", folder / "best.replaced")
        else:
            (folder / "best").rename(folder / "best.replaced")
        assert run_one(config, "words", 0, device, StopSignal())
        assert not (folder / "best.replaced").exists()
        assert torch.equal(trained(config)["head.weight"], expected["head.weight"])


def test_a_result_stands_for_its_backbone_and_its_data(
    make: Any, device: torch.device, backbone: Path, tasks: Path, tmp_path: Path
):
    """Both may change under their names: a backbone trained again, a file of examples mended."""
    copies = {"backbone": tmp_path / "model", "data": tmp_path / "data"}
    shutil.copytree(backbone, copies["backbone"])
    shutil.copytree(tasks, copies["data"])
    given = {key: str(folder) for key, folder in copies.items()}
    config = make({"method": "head"}, tuning={"epochs": 1.0}, **given)
    assert run_all(config, device, StopSignal())
    assert run_all(config, device, StopSignal())
    path = copies["data"] / "words" / "dev.jsonl"
    text = path.read_text()
    path.write_text(text.replace('"label": 1', '"label": 0', 1))
    read_splits.cache_clear()  # of a process of its own
    with pytest.raises(InputError, match=r"result\.json: data_sha256 was .* use another run_dir"):
        run_all(config, device, StopSignal())
    path.write_text(text)
    read_splits.cache_clear()
    shape = ModelConfig.from_json(copies["backbone"] / "model.json")
    dataclasses.replace(shape, rope_theta=100.0).to_json(copies["backbone"] / "model.json")
    reseal(copies["backbone"], "model.json")
    with pytest.raises(InputError, match=r"result\.json: backbone_config_sha256 was "):
        run_all(config, device, StopSignal())
    shape.to_json(copies["backbone"] / "model.json")
    reseal(copies["backbone"], "model.json")
    assert run_all(config, device, StopSignal())
    weights = safetensors.torch.load_file(copies["backbone"] / "model.safetensors")
    weights["layers.0.feed_forward.up_proj.weight"] += 1
    safetensors.torch.save_file(weights, copies["backbone"] / "model.safetensors")
    reseal(copies["backbone"], "model.safetensors")
    with pytest.raises(InputError, match=r"result\.json: backbone_fingerprint was "):
        run_all(config, device, StopSignal())


def test_what_is_written_loads_onto_the_backbone_and_computes_the_same(
    make: Any, device: torch.device, backbone: Path
):
    """best/delta and compact/, checked against the backbone's fingerprint, with the head."""
    config = make(SORA, sparsity=SparsityConfig(strength=6.0))
    assert run_all(config, device, StopSignal())
    folder, ids = config.folder("words", 0), torch.tensor([[1, 9, 30, 4]])
    outputs = {}
    for name in ("best/delta", "compact"):
        model = checkpoint.load_model(backbone, device, torch.float32)
        loaded = load_delta(folder / name, model)
        assert torch.equal(loaded.extra["head.weight"], trained(config)["head.weight"])
        assert loaded.about["task"] == "words"
        before = model(ids)
        Deltas(model).insert("it", loaded.delta)
        outputs[name] = model(ids)
        assert not torch.equal(before, outputs[name])
    torch.testing.assert_close(outputs["best/delta"], outputs["compact"], rtol=1e-4, atol=1e-5)
    other = checkpoint.load_model(backbone, device, torch.float32)
    with torch.no_grad():
        other.layers[0].feed_forward.up_proj.weight += 1
    with pytest.raises(ValueError, match="belongs to the backbone"):
        load_delta(folder / "compact", other)

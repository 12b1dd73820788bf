"""Two models side by side: arithmetic by hand, refusals, every mode from end to end at tiny sizes.
Nothing looks at how long it took.
"""

import csv
import json
import signal
import sys
import time
import weakref
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml

from data.errors import InputError
from eval.throughput import inference
from eval.throughput.__main__ import main
from eval.throughput.cells import runs_of
from eval.throughput.comparison import compare, flops_per_token, side_row
from eval.throughput.conditions import conditions, require_equal
from eval.throughput.options import Cell, Options, parse, run_of, side_names
from eval.throughput.output import cell_text, sweep_text
from eval.throughput.sides import Side, choose_resident, measure, resident_memory_alone
from eval.throughput.workload import random_tokens
from model import ModelConfig
from model.cache import added_flops
from model.config import Ranks
from model.execution import Plan
from tests.conftest import BIN, Runs, finish, free_port
from training.bench import processes

CPU = torch.device("cpu")
MODEL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2,
    "max_seq_len": 64,
}  # fmt: skip
TRAINING = {
    "run_dir": "unused", "max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2,
    "seq_len": 16, "learning_rate": 1e-3,
}  # fmt: skip


class Pair:
    """Two YAML files, LPA and its twin, and what is measured on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options: list[str] = []
        self.write("lpa", "--config", {"r": 8})
        self.write("vanilla", "--baseline", {})

    def write(self, name: str, option: str, model: dict[str, Any], **changes: Any) -> None:
        """A YAML; changes are dotted keys, `training__seq_len=8`."""
        run = {"model": MODEL | model, "training": dict(TRAINING)}
        for key, value in changes.items():
            block, _, leaf = key.partition("__")
            run.setdefault(block, {})[leaf] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run))
        if option in self.options:
            del self.options[self.options.index(option) :][:2]
        self.options += [option, str(path)]

    def parse(self, *options: str) -> Options:
        """As the command parses it."""
        return parse([*self.options, *options])

    def run(self, *options: str, mode: str = "evaluate") -> Any:
        """The result of the command without measuring memory, as its JSON has it."""
        output = self.folder / "out.json"
        argv = ["--mode", mode, "--rounds", "2", "--sequences", "4", "--memory", "false"]
        assert main([*self.options, *argv, "--output", str(output), *options]) == 0
        return json.loads(output.read_text())


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def rounds_of(*seconds: float) -> list[dict[str, float]]:
    return [{"seconds_per_step": one} for one in seconds]


def check_cell(cell: dict[str, Any], mode: str, rounds: int) -> None:
    """What stands in a result follows from the seconds that stand beside it."""
    assert cell["status"] == "ok"
    per_token = {}
    for name, side in cell["sides"].items():
        seconds = np.array([one["seconds_per_step"] for one in side["rounds"]])
        assert len(seconds) == rounds
        assert (seconds > 0).all()
        tokens = side["tokens_per_step"]
        assert side["tokens_per_second"] == pytest.approx(tokens / np.median(seconds))
        assert side["seconds_per_step_p90"] == pytest.approx(np.quantile(seconds, 0.9))
        assert side["mfu"] is None
        per_token[name] = np.median(seconds) / tokens
        model = ModelConfig.from_dict(cell["runs"][name]["model"])
        assert side["parameters"] == model.num_parameters()
        assert side["flops_per_token_forward"] == model.flops_per_token(side["seq_len"])
        assert (side["loss_nats_per_token"] is None) == (mode in ("prefill", "decode"))
        assert side["plan"][0].startswith("kernels: ")
    found = cell["comparison"]
    ratio = per_token["config"] / per_token["baseline"]
    assert found["time_ratio"]["ratio"] == pytest.approx(ratio)
    assert found["tokens_per_second_ratio"]["ratio"] == pytest.approx(1 / ratio)
    assert found["saved_time_share"]["ratio"] == pytest.approx(1 - ratio)
    flops = [side["flops_per_token"] for side in cell["sides"].values()]
    assert found["saved_flops_share"] == pytest.approx(1 - flops[0] / flops[1])
    assert found["share_reached"]["ratio"] == pytest.approx(
        (1 - ratio) / found["saved_flops_share"]
    )
    assert cell["unequal"] == {}
    assert cell["model_differences"] == {"model.r": [8, None]}
    first, second = cell["sides"].values()
    for key in ("steps_before_loss", "tokens_before_loss", "tokens_per_step"):
        assert first[key] == second[key]


# --- arithmetic ---------------------------------------------------------------------------------


def test_a_side_by_hand():
    rounds = [
        {"seconds_per_step": s, "forward_seconds": s / 4, "backward_seconds": s / 2,
         "optimizer_seconds": s / 8} for s in (1.0, 3.0, 2.0)
    ]  # fmt: skip
    row = side_row("lpa", rounds, 100, 6.0, 3000.0)
    assert row["tokens_per_second"] == 50
    assert row["tokens_per_second_p10"] == pytest.approx(100 / 2.8)
    assert row["tokens_per_second_p90"] == pytest.approx(100 / 1.2)
    assert row["seconds_per_step_median"] == 2
    assert [row[f"{p}_seconds_median"] for p in ("forward", "backward", "optimizer")] == [
        0.5, 1, 0.25,
    ]  # fmt: skip
    assert row["flops_per_second"] == 300
    assert row["mfu"] == pytest.approx(0.1)
    assert row["rounds"] == rounds
    assert side_row("lpa", rounds, 100, 6.0, None)["mfu"] is None


def test_a_comparison_by_hand():
    """2 s against 4 s with 3/4 of the FLOPs: half of the time saved, twice what FLOPs allow."""
    own = side_row("lpa", rounds_of(1, 2, 3), 100, 60.0, None)
    other = side_row("vanilla", rounds_of(4, 2, 4), 100, 80.0, None)
    found = compare(own, other)
    assert found["time_ratio"]["ratio"] == 0.5
    assert found["tokens_per_second_ratio"]["ratio"] == 2
    assert found["saved_flops_share"] == 0.25
    assert found["saved_time_share"]["ratio"] == 0.5
    assert found["share_reached"]["ratio"] == 2
    low, high = found["time_ratio"]["low"], found["time_ratio"]["high"]
    assert low < 0.5 < high
    assert found["saved_time_share"]["low"] == pytest.approx(1 - high)
    assert found["share_reached"]["high"] == pytest.approx((1 - low) / 0.25)
    # Twice the tokens in a step: the same time a token.
    twice = side_row("vanilla", rounds_of(2, 4, 6), 200, 60.0, None)
    same = compare(own, twice)
    assert same["time_ratio"]["ratio"] == 1
    assert same["share_reached"] is None


def table_of(comparison: dict[str, Any], side: dict[str, Any]) -> str:
    """What is printed of a comparison of a side with itself."""
    keys = (
        "peak_memory_bytes",
        "memory_is",
        "loss_nats_per_token",
        "parameters",
        "steps_before_loss",
    )
    side = dict.fromkeys(keys) | side | {"parameters": 1, "tokens_before_loss": 1, "plan": []}
    cell = {"cell": {}, "status": "ok", "resident": "both", "unequal": {}, "model_differences": {}}
    cell |= {"sides": {"config": side, "baseline": side}, "comparison": comparison}
    line = sweep_text([cell]).splitlines()[-1]
    assert ("too few" in line) == comparison["too_few_rounds_for_95_percent"]
    return cell_text("evaluate", cell)


def test_no_share_is_reached_where_no_flops_are_saved():
    more, less = (side_row("one", rounds_of(1, 2), 100, f, None) for f in (80.0, 60.0))
    found = compare(more, less)
    assert found["saved_flops_share"] == pytest.approx(-1 / 3)
    assert found["share_reached"] is None
    assert "FLOPs saved -33.3%; share reached n/a" in table_of(found, more)
    assert "FLOPs saved 25.0%, the limit; share reached 0.00" in table_of(compare(less, more), less)


@pytest.mark.parametrize("rounds", [5, 6])
def test_few_rounds_have_no_95_percent_interval(rounds: int):
    side = side_row("one", rounds_of(*range(1, rounds + 1)), 100, 60.0, None)
    found = compare(side, side)
    assert found["too_few_rounds_for_95_percent"] == (rounds == 5)
    said = "5 rounds are too few for 95 % intervals: give --rounds 6 or more"
    shown = table_of(found, side)
    assert (said in shown) == (rounds == 5)
    assert ("; 95 % intervals" in shown) == (rounds == 6)


def test_flops_of_a_token():
    model = ModelConfig(**MODEL, r=8)
    forward = model.flops_per_token(16)
    assert flops_per_token(model, "train", 16, 5) == 3 * forward
    assert flops_per_token(model, "evaluate", 16, 5) == forward
    assert flops_per_token(model, "prefill", 16, 5) == forward
    # A token behind n others attends to n + 1 keys: 4 · heads · head_dim · (n + 1) in each layer.
    without = forward - 2 * 4 * 32 * 17 / 2
    tokens = [without + 2 * 4 * 32 * (16 + i) for i in range(1, 6)]
    assert flops_per_token(model, "decode", 16, 5) == pytest.approx(sum(tokens) / 5)


def test_tokens_are_a_function_of_seed_and_index():
    first = random_tokens(0, 3, (2, 5), 64, CPU)
    assert torch.equal(first, random_tokens(0, 3, (2, 5), 64, CPU))
    assert not torch.equal(first, random_tokens(0, 4, (2, 5), 64, CPU))
    assert not torch.equal(first, random_tokens(1, 3, (2, 5), 64, CPU))
    assert int(random_tokens(0, 0, (50, 50), 7, CPU).max()) == 6


# --- turns --------------------------------------------------------------------------------------


class Recorded:
    """A workload that writes down what is done with it."""

    plan = Plan(False, False, [])
    tokens_per_step = 4

    def __init__(self, name: str, calls: list[str], loss: float = 1.0) -> None:
        self.name, self.calls, self.value = name, calls, loss
        calls.append(f"build {name}")

    def round(self, steps: int) -> dict[str, float]:
        self.calls.append(f"{self.name}{steps}")
        return {"seconds_per_step": float(steps)}

    def loss(self) -> float:
        return self.value

    def close(self) -> None:
        self.calls.append(f"free {self.name}")


def recorded(calls: list[str], loss: float = 1.0) -> dict[str, Side]:
    return {n: Side(n, lambda n=n: Recorded(n, calls, loss), CPU) for n in "AB"}


def test_both_resident_take_turns(pair: Pair):
    calls: list[str] = []
    sides = recorded(calls)
    measure(sides, pair.parse("--rounds", "2", "--warm_up", "3", "--steps", "5"), "both")
    assert calls == [
        "build A", "A3", "build B", "B3", "A5", "B5", "A5", "B5", "free A", "free B",
    ]  # fmt: skip
    assert sides["A"].rounds == rounds_of(5, 5)
    assert sides["A"].steps_done == 13


def test_one_resident_takes_turns_too(pair: Pair):
    calls: list[str] = []
    sides = recorded(calls)
    measure(sides, pair.parse("--rounds", "2", "--warm_up", "3", "--steps", "5"), "one")
    turn = [call for n in "AB" for call in (f"build {n}", f"{n}3", f"{n}5", f"free {n}")]
    assert calls == turn * 2
    assert [len(side.rounds) for side in sides.values()] == [2, 2]


def test_nothing_is_timed_where_the_loss_is_not_finite(pair: Pair):
    calls: list[str] = []
    with pytest.raises(InputError, match="A: the loss or the logits after the warm-up are not"):
        measure(recorded(calls, loss=float("nan")), pair.parse(), "both")
    assert calls == ["build A", "A3", "free A"]


def test_only_one_model_is_in_memory(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    build, models = inference.plain_model, []

    def watched(*arguments: Any) -> Any:
        assert all(model() is None for model in models)
        found = build(*arguments)
        models.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(inference, "plain_model", watched)
    one = pair.run("--resident", "one")["cells"][0]
    assert len(models) == 4
    assert one["resident"] == "one"
    monkeypatch.undo()
    both = pair.run("--resident", "both")["cells"][0]
    for name in ("config", "baseline"):
        losses = [cell["sides"][name]["loss_nats_per_token"] for cell in (one, both)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("mode", ["train", "evaluate", "decode"])
def test_what_stays_in_memory_follows_from_the_formula(pair: Pair, mode: str):
    options = pair.parse("--mode", mode)
    runs = runs_of(options, Cell(), CPU)
    assert choose_resident(options, Cell(), runs, CPU) == "both"
    # Of a width that no machine has the memory for.
    for run in runs.values():
        run.model.hidden_size, run.model.num_layers = 2**20, 2**10
    assert choose_resident(options, Cell(), runs, CPU) == "one"
    assert choose_resident(pair.parse("--resident", "both"), Cell(), runs, CPU) == "both"


# --- conditions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "values"),
    [
        ({"training__precision": "bf16"}, "training.precision", ("fp32", "bf16")),
        ({"training__micro_batch_size": 4}, "training.micro_batch_size", ("2", "4")),
        ({"training__seq_len": 8}, "training.seq_len", ("16", "8")),
        ({"training__gradient_clipping": 0.0}, "training.gradient_clipping", ("1.0", "0.0")),
        ({"deepspeed__zero_stage": 2}, "deepspeed.zero_stage", ("1", "2")),
        ({"deepspeed__overlap_comm": True}, "deepspeed.overlap_comm", ("False", "True")),
        ({"deepspeed__offload_optimizer": "cpu"}, "deepspeed.offload_optimizer", ("none", "cpu")),
        ({"deepspeed__reduce_bucket_size": 9}, "deepspeed.reduce_bucket_size", ("500", "9")),
        ({"deepspeed__allgather_bucket_size": 9}, "deepspeed.allgather_bucket_size", ("500", "9")),
        ({"execution__kernels": "triton"}, "execution.kernels", ("plain torch", "fused operators")),
        ({"execution__attention": "math"}, "execution.attention", ("its own choice", "math")),
        ({"execution__compile": "on"}, "execution.compile", ("not compiled", "compiled")),
        ({"execution__recompute_qkv": True}, "execution.recompute_qkv", ("False", "True")),
        ({"execution__recompute_ffn": True}, "execution.recompute_ffn", ("False", "True")),
        ({"execution__recompute_blocks": True}, "execution.recompute_blocks", ("False", "True")),
        ({"execution__recompute_every": 2}, "execution.recompute_every", ("1", "2")),
        ({"execution__loss": "whole"}, "execution.loss", ("chunked", "whole")),
        ({"execution__loss_chunk_tokens": 8}, "execution.loss_chunk_tokens", ("None", "8")),
        # The YAML's execution is the same: what ran is not.
        ({"model__document_start_id": 1}, "execution.attention", ("choice)", "within documents")),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_unequal_conditions_are_refused(
    pair: Pair, change: dict[str, Any], key: str, values: tuple[str, str]
):
    pair.write("other", "--baseline", {}, **change)
    with pytest.raises(InputError) as caught:
        runs_of(pair.parse(), Cell(), CPU)
    message = str(caught.value)
    first, _, second = message.partition(f"{key} is ")[2].partition(" of lpa and ")
    assert values[0] in first
    assert values[1] in second.partition(" of other")[0]
    assert message.count(" of lpa and ") == 1  # this key and no other
    assert "--allow_unequal" in message
    assert runs_of(pair.parse("--allow_unequal"), Cell(), CPU).keys() == {"config", "baseline"}


def test_what_ran_counts_and_not_what_was_asked_for(pair: Pair):
    """auto and reference are plain torch on a CPU alike; a check on the device that fails for one
    of two models with equal YAML is not.
    """
    pair.write("other", "--baseline", {}, execution__kernels="reference")
    runs = runs_of(pair.parse(), Cell(), CPU)
    names = side_names(pair.parse())
    lines = ["kernels: fused operators; Triton: norm", "attention: torch SDPA (cudnn)"]
    plans = {
        "config": Plan(False, True, ["kernels: plain torch; failed", lines[1]]),
        "baseline": Plan(True, True, lines),
    }
    found = {side: conditions(runs[side], plans[side], training=True) for side in runs}
    with pytest.raises(
        InputError, match=r"kernels is plain torch of lpa and fused operators by Triton of other"
    ):
        require_equal(found, names, allowed=False)
    assert require_equal(found, names, allowed=True) == {
        "execution.kernels": ["plain torch", "fused operators by Triton"]
    }


def test_a_forward_pass_has_no_optimizer(pair: Pair):
    pair.write("other", "--baseline", {}, deepspeed__zero_stage=2, execution__recompute_ffn=True)
    runs_of(pair.parse("--mode", "evaluate"), Cell(), CPU)


def test_what_is_unequal_stands_in_the_result(pair: Pair, capsys: pytest.CaptureFixture[str]):
    pair.write("other", "--baseline", {"num_layers": 1}, training__micro_batch_size=4)
    (cell,) = pair.run("--allow_unequal")["cells"]
    assert cell["unequal"] == {"training.micro_batch_size": [2, 4]}
    assert cell["model_differences"] == {"model.num_layers": [2, 1], "model.r": [8, None]}
    shown = capsys.readouterr().out
    assert "NOT EQUAL: training.micro_batch_size: 2 and 4" in shown
    assert "models differ: model.r: 8 and null" in shown


# --- the modes from end to end ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "steps", "tokens"), [("evaluate", 1, 64), ("prefill", 3, 32), ("decode", 4, 2)]
)
def test_inference_from_end_to_end(
    pair: Pair, mode: str, steps: int, tokens: int, capsys: pytest.CaptureFixture[str]
):
    result = pair.run("--steps", str(steps), mode=mode)
    (cell,) = result["cells"]
    check_cell(cell, mode, rounds=2)
    assert cell["sides"]["config"]["tokens_per_step"] == tokens
    assert result["settings"]["steps"] == steps
    about = result["environment"]
    assert about["packages"]["torch"] == torch.__version__
    assert "command_line" not in about
    shown = capsys.readouterr().out
    for part in ("lpa", "vanilla", "tokens/s", "share reached", "kernels: plain torch"):
        assert part in shown
    with (pair.folder / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["side"], row["rounds"]) for row in rows] == [("config", "2"), ("baseline", "2")]
    speeds = [side["tokens_per_second"] for side in cell["sides"].values()]
    assert [float(row["tokens_per_second"]) for row in rows] == speeds
    assert (pair.folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_evaluation_is_that_of_the_model(pair: Pair):
    """The loss is that of the initial weights on the same tokens, computed here in one batch."""
    (cell,) = pair.run()["cells"]
    for name in ("config", "baseline"):
        run = run_of(name, pair.parse(), Cell(), 1)
        model, _ = inference.plain_model(run, CPU)
        tokens = torch.cat([random_tokens(0, i, (2, 17), 64, CPU) for i in range(2)])
        with torch.no_grad():
            loss = model(tokens[:, :-1], tokens[:, 1:]).item()
        assert cell["sides"][name]["loss_nats_per_token"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("form", ["full", "value_latent", "latent"])
def test_decoding_continues_the_context(pair: Pair, form: Any):
    """Each token is the likeliest after all before it, by the model without a cache."""
    options = pair.parse("--mode", "decode", "--steps", "5")
    run = run_of("config", options, Cell(), 1)
    work = inference.Decode(run, CPU, 64, options.new_tokens(), form)
    assert work.cache.form == form
    for _ in range(2):  # each round begins at the end of the context
        work.round(5)
        text = random_tokens(0, 0, (2, 16), 64, CPU)
        for _ in range(6):
            with torch.no_grad():
                text = torch.cat([text, work.model(text)[:, -1:].argmax(dim=-1)], dim=1)
        assert torch.equal(work.token, text[:, -1:])
    assert work.cache.length == 21


def test_forms_of_the_cache_against_each_other(pair: Pair, capsys: pytest.CaptureFixture[str]):
    """The model against itself: bytes a token by hand, and the baseline always in full."""
    pair.options[pair.options.index("--baseline") + 1] = str(pair.folder / "lpa.yaml")
    forms = ["full", "value_latent", "latent"]
    options = ["--sweep", "--caches", *forms, "--steps", "4"]
    cells = pair.run(*options, mode="decode")["cells"]
    assert [cell["cell"]["cache"] for cell in cells] == forms
    shown = capsys.readouterr().out
    # 2 layers of float32: 32 numbers for keys in full and for values, 8 for a latent.
    for cell, numbers in zip(cells, (64, 40, 16), strict=True):
        own, other = cell["sides"]["config"], cell["sides"]["baseline"]
        assert own["cache_bytes_per_token"] == 2 * 4 * numbers
        assert (other["cache"], other["cache_bytes_per_token"]) == ("full", 2 * 4 * 64)
        left = psutil.virtual_memory().total - 4 * own["parameters"]
        assert own["longest_context_tokens"] == left // (2 * 2 * 4 * numbers)
        assert f"cache {own['cache']}" in shown
        assert f"{own['longest_context_tokens']:,}" in shown
        more = added_flops(ModelConfig(**MODEL, r=8), own["cache"], 18.5)  # 16 and 1 to 4
        assert own["flops_per_token"] - other["flops_per_token"] == pytest.approx(more)
    with (pair.folder / "out.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["side"] == "config"]
    assert [row["cache"] for row in rows] == forms


def test_flops_that_latents_add():
    """H 4, H_kv 2, D 8, r_v 12, r_k 6, 3 layers, 10 keys: by hand, of one token."""
    model = ModelConfig(64, 32, 56, 3, 4, num_kv_heads=2, r=Ranks(k=6, v=12))
    assert added_flops(model, "full", 10) == 0
    values = 2 * 10 * 4 * (12 - 8) + 2 * 12 * 8 * (4 - 2)
    assert added_flops(model, "value_latent", 10) == 3 * values
    assert added_flops(model, "latent", 10) == 3 * (values + 2 * 9 * 6 * 2 * 8)
    # 16 heads over 2 groups of 2 numbers: rebuilding 4 · 2 · 2 a key is less than 16 · (4 - 2).
    many = ModelConfig(64, 32, 56, 3, 16, num_kv_heads=2, r=Ranks(v=4))
    assert added_flops(many, "value_latent", 10) == 3 * 2 * 9 * 4 * 2 * 2


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of mode train, from a process of its own: it joins a process group."""
    pair = Pair(tmp_path_factory.mktemp("compared"))
    output = pair.folder / "out.json"
    options = ["--rounds", "3", "--steps", "2", "--accumulation", "2", "--memory", "false"]
    command = processes.python("-m", "eval.throughput", *pair.options, *options)
    processes.run([*command, "--output", str(output)])
    return json.loads(output.read_text())


def test_training_from_end_to_end(compared: Any):
    (cell,) = compared["cells"]
    check_cell(cell, "train", rounds=3)
    for side in cell["sides"].values():
        assert side["tokens_per_step"] == 2 * 2 * 16
        assert side["steps_before_loss"] == 3 + 3 * 2
        assert side["flops_per_token"] == 3 * side["flops_per_token_forward"]
        for one in side["rounds"]:
            parts = [one[f"{phase}_seconds"] for phase in ("forward", "backward", "optimizer")]
            assert all(part > 0 for part in parts)
            assert sum(parts) < one["seconds_per_step"]


def test_training_of_both_sides_learns_from_the_same_tokens(compared: Any):
    """Twins of the same seed have losses near ln 64 = 4.16 on uniform tokens, and not the same."""
    losses = [side["loss_nats_per_token"] for side in compared["cells"][0]["sides"].values()]
    assert losses == pytest.approx([np.log(64)] * 2, abs=0.1)
    assert losses[0] != losses[1]


def test_resident_memory_of_one_side(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """The process starts in the repository's root, the paths are from somewhere else."""
    monkeypatch.chdir(pair.folder)
    options = ["--config", "lpa.yaml", "--baseline", "vanilla.yaml", "--mode", "prefill"]
    found = resident_memory_alone("config", parse(options), Cell(), 64)
    assert found["peak_memory_bytes"] >= found["before_building_bytes"] > 2**26


@pytest.mark.slow
def test_a_signal_ends_the_process_that_measures_memory(pair: Pair, runs: Runs):
    command = processes.python("-m", "eval.throughput", *pair.options, "--mode", "prefill")
    parent = runs.launch(command)
    children: list[psutil.Process] = []
    while not children and parent.poll() is None:
        time.sleep(0.05)
        children = [
            child for child in psutil.Process(parent.pid).children()
            if "eval.throughput.alone" in child.cmdline()
        ]  # fmt: skip
    parent.terminate()
    assert parent.wait(timeout=60) == 128 + signal.SIGTERM
    assert children
    assert not any(child.is_running() for child in children)


@pytest.mark.slow
def test_two_ranks(pair: Pair, runs: Runs):
    output = str(pair.folder / "two.json")
    launcher = [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"]
    options = [*pair.options, "--rounds", "2", "--steps", "2", "--output", output]
    out, _ = finish(runs.launch([*launcher, "-m", "eval.throughput", *options]), timeout=300)
    result = json.loads(Path(output).read_text())
    (cell,) = result["cells"]
    check_cell(cell, "train", rounds=2)
    assert result["environment"]["world_size"] == 2
    assert out.count("tokens/s, ratio") == 1  # rank 0 alone
    for side in cell["sides"].values():
        assert side["tokens_per_step"] == 2 * 2 * 16
        assert side["memory_is"] == "RSS of a process of its own"
        assert side["peak_memory_bytes"] >= side["before_building_bytes"]


@pytest.mark.slow
def test_seconds_are_those_of_the_slowest_rank():
    code = (
        "from eval.throughput.train import _of_the_slowest; from training import distributed;"
        "distributed.init_distributed(); slow = distributed.rank();"
        "keys = ['seconds_per_step', 'forward_seconds', 'backward_seconds', 'optimizer_seconds'];"
        "mine = dict(zip(keys, [5.0, 1.0, 2.0, 2.0] if slow else [4.0, 3.0, 0.5, 0.5]));"
        "assert _of_the_slowest(mine) == dict(zip(keys, [5.0, 1.0, 2.0, 2.0]));"
        "distributed.barrier(); distributed.leave(0)"
    )
    port = processes.free_port()
    processes.run_all(
        [processes.python("-c", code)] * 2,
        [processes.rank_environment(rank, 2, port) for rank in range(2)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_engine_is_freed(pair: Pair, stage: int):
    """What DeepSpeed keeps of an engine would be in the way of the next one on a GPU."""
    argv = [*pair.options, "--deepspeed.zero_stage", str(stage)]
    code = f"""
import weakref
from eval.throughput.options import Cell, parse, run_of
from eval.throughput.sides import Side, workload
from training import distributed
device, options = distributed.init_distributed(), parse({argv!r})
run = run_of("config", options, Cell(), 1)
side = Side("lpa", lambda: workload(options, run, device, 64), device)
work = side.open(2)
alive = [weakref.ref(p) for p in work.engine.model.parameters()]
alive += [weakref.ref(work.engine.deepspeed), weakref.ref(work.engine.optimizer)]
del work
side.close()
assert not any(one() is not None for one in alive)
distributed.leave(0)
"""
    processes.run(processes.python("-c", code))


@pytest.mark.slow
@pytest.mark.parametrize("options", [("one", "0"), ("both", "3"), ("one", "3")], ids="-".join)
def test_losses_do_not_depend_on_stage_and_residence(
    pair: Pair, compared: Any, options: tuple[str, str]
):
    """Both sides in one process, at stage 3 too, where DeepSpeed patches torch."""
    output, (resident, stage) = pair.folder / "out.json", options
    steps = "2" if resident == "both" else "6"  # after the last building, 3 + 6 in either case
    rounds = "3" if resident == "both" else "2"
    argv = ["--rounds", rounds, "--steps", steps, "--accumulation", "2", "--memory", "false"]
    argv += ["--resident", resident, "--deepspeed.zero_stage", stage, "--output", str(output)]
    processes.run(processes.python("-m", "eval.throughput", *pair.options, *argv))
    (cell,), (reference,) = json.loads(output.read_text())["cells"], compared["cells"]
    for name, side in cell["sides"].items():
        expected = reference["sides"][name]["loss_nats_per_token"]
        assert side["loss_nats_per_token"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_steps_that_the_engine_leaves_out_are_no_speed(pair: Pair):
    command = processes.python("-m", "eval.throughput", *pair.options, "--memory", "false")
    with pytest.raises(processes.ProgramError, match=r"exit code 2: .*3 of 3 steps .* left them"):
        processes.run([*command, "--model.init_std", "1e30"])


# --- sweeps -------------------------------------------------------------------------------------

SWEEP = ("--sweep", "--seq_lens", "8", "16", "--micro_batch_sizes", "2", "4")


def test_a_sweep(pair: Pair, capsys: pytest.CaptureFixture[str]):
    result = pair.run(*SWEEP, "--compile", "false", "--kernels", "reference")
    cells = [tuple(cell["cell"].values()) for cell in result["cells"]]
    assert cells == [(t, b, "reference", "off", None) for t in (8, 16) for b in (2, 4)]
    for cell in result["cells"]:
        check_cell(cell, "evaluate", rounds=2)
        assert cell["runs"]["config"]["execution"]["kernels"] == "reference"
        assert cell["sides"]["config"]["seq_len"] == cell["cell"]["seq_len"]
    with (pair.folder / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        place = (int(row["cell_seq_len"]), int(row["cell_micro_batch_size"]))
        cell = result["cells"][[c[:2] for c in cells].index(place)]
        side = cell["sides"][row["side"]]
        assert float(row["tokens_per_second"]) == side["tokens_per_second"]
        assert float(row["share_reached_low"]) == cell["comparison"]["share_reached"]["low"]
    assert (pair.folder / "out.png").read_bytes().startswith(b"\x89PNG")
    assert "8 tokens, 4 sequences, kernels reference, compile off" in capsys.readouterr().out


def test_a_cell_out_of_memory_is_a_row(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    build, step, models, alive = inference.plain_model, inference.Evaluate.step, [], []

    def watched(*arguments: Any) -> Any:
        alive.append(sum(model() is not None for model in models))
        found = build(*arguments)
        models.append(weakref.ref(found[0]))
        return found

    def full(self: inference.Evaluate) -> None:
        step(self)
        if self.batch == 2 and self.model.config.r is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate.\nMore lines.")

    monkeypatch.setattr(inference, "plain_model", watched)
    monkeypatch.setattr(inference.Evaluate, "step", full)
    sweep = ("--sweep", "--micro_batch_sizes", "2", "4")
    result = pair.run(*sweep)
    assert alive == [0, 1, 0, 1]  # what the first cell had built was gone before the second
    assert [cell["status"] for cell in result["cells"]] == ["out of memory", "ok"]
    assert result["cells"][0]["message"] == "CUDA out of memory. Tried to allocate."
    check_cell(result["cells"][1], "evaluate", rounds=2)
    with (pair.folder / "out.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["out of memory", "ok", "ok"]
    assert "2 sequences: out of memory: CUDA out of memory." in capsys.readouterr().out
    assert pair.run(*sweep)["cells"] == result["cells"]  # such a cell is finished as well


def test_memory_of_a_cpu_runs_out(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    """By an allocation that this machine refuses; of a single comparison too."""

    def full(self: inference.Evaluate) -> None:
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(inference.Evaluate, "step", full)
    (cell,) = pair.run()["cells"]
    assert cell["status"] == "out of memory"
    assert cell["message"].startswith("DefaultCPUAllocator: can't allocate memory: you tried to")
    assert (pair.folder / "out.png").read_bytes().startswith(b"\x89PNG")

    def wrong(self: inference.Evaluate) -> None:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(inference.Evaluate, "step", wrong)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        pair.run()


@pytest.mark.slow
def test_the_process_that_measures_memory_runs_out_of_it(pair: Pair):
    output = pair.folder / "out.json"
    width = 2**26  # for which no machine has the memory
    sizes = ["--model.hidden_size", str(width), "--model.intermediate_size", str(width)]
    argv = [*pair.options, "--mode", "evaluate", "--sequences", "4", *sizes]
    assert main([*argv, "--output", str(output)]) == 0
    (cell,) = json.loads(output.read_text())["cells"]
    assert cell["status"] == "out of memory"
    assert cell["message"].startswith("DefaultCPUAllocator: can't allocate memory")


def test_an_interrupted_sweep_goes_on(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    step, sweep = inference.Evaluate.step, ("--sweep", "--micro_batch_sizes", "2", "4")

    def interrupted(self: inference.Evaluate) -> None:
        step(self)
        if self.batch == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(inference.Evaluate, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pair.run(*sweep)
    (done,) = json.loads((pair.folder / "out.json").read_text())["cells"]
    assert sorted(path.name for path in pair.folder.iterdir()) == [
        "lpa.yaml", "out.csv", "out.json", "out.png", "vanilla.yaml",
    ]  # fmt: skip
    first, second = pair.run(*sweep)["cells"]
    assert first == done  # to the last digit of its seconds
    check_cell(second, "evaluate", rounds=2)


def test_a_sweep_of_other_settings_is_not_continued(pair: Pair):
    pair.run("--sweep", "--seq_lens", "8")
    before = (pair.folder / "out.json").read_text()
    with pytest.raises(InputError, match=r"out\.json: has cells measured with rounds 2, .* 3"):
        pair.run("--sweep", "--seq_lens", "8", "16", "--rounds", "3")
    pair.write("vanilla", "--baseline", {"num_layers": 1})
    with pytest.raises(InputError, match=r"out\.json: the YAML files have changed .* 8 tokens"):
        pair.run("--sweep", "--seq_lens", "8", "16")
    assert (pair.folder / "out.json").read_text() == before
    (pair.folder / "out.json").write_text("[]")
    with pytest.raises(InputError, match=r"out\.json: exists, and is no result"):
        pair.run("--sweep", "--seq_lens", "8")


def test_a_sweep_is_refused_whole_before_anything_is_measured(pair: Pair):
    with pytest.raises(InputError, match=r"seq_len: 128 is over model\.max_seq_len 64"):
        pair.run("--sweep", "--seq_lens", "8", "128")
    assert not (pair.folder / "out.json").exists()


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--sed_len", "3"], ["--sed_len", "did you mean --seq_len?"]),
        (["--training.seed", "3"], ["--training.seed"]),
        (["--execution.kernel", "auto"], ["--execution.kernel", "execution.kernels"]),
        (["--execution.kernels", "fast"], ["execution.kernels", "'fast'", "reference"]),
        (["--rounds", "1"], ["--rounds", "'1'", "from 2"]),
        (["--steps", "0"], ["--steps", "'0'", "from 1"]),
        (["--memory", "no"], ["--memory", "'no'", "true or false"]),
        (["--seq_lens", "4"], ["--seq_lens", "--sweep"]),
        (["--sweep"], ["--sweep", "--seq_lens", "--compile"]),
        (["--sweep", "--seq_lens", "4", "--seq_len", "4"], ["--seq_len 4", "--seq_lens"]),
        (["--seq_len", "65"], ["--config", "65", "max_seq_len 64"]),
        (["--mode", "decode", "--steps", "60"], ["--steps: 60", "max_seq_len 64"]),
        (["--cache", "latent"], ["--cache: for modes prefill and decode", "is evaluate"]),
        (
            ["--mode", "decode", "--cache", "full", "--sweep", "--caches", "latent"],
            ["--cache full", "--caches is given"],
        ),
        (
            ["--mode", "decode", "--cache", "latent", "--model.r", "null"],
            ["--cache: latent", "v_proj", "allowed is full"],
        ),
        (["--mode", "evaluate", "--sequences", "3"], ["--sequences: 3", "multiple", "2"]),
        (["--output", "no/such/out.json"], ["--output", "no/such"]),
        (["--output", "out.txt"], ["--output out.txt", ".json"]),
        (["--device", "cuda"], ["--device", "GPU"]),
        (["--mode", "evaluate", "--device", "cuda"], ["--device", "GPU"]),
        (["--execution.attention", "cudnn"], ["execution.attention", "cudnn", "GPU"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of it is allowed there")
def test_bad_input_is_one_line(pair: Pair, arguments: list[str], expected: list[str]):
    options = arguments if "--mode" in arguments or "--device" in arguments else [
        "--mode", "evaluate", *arguments,
    ]  # fmt: skip
    with pytest.raises(InputError) as caught:
        main([*pair.options, "--memory", "false", *options])
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize("ending", ["json", "csv", "png"])
def test_an_output_that_is_a_folder_is_refused(pair: Pair, ending: str):
    folder, output = pair.folder / f"out.{ending}", pair.folder / "out.json"
    folder.mkdir()
    with pytest.raises(InputError) as caught:
        pair.parse("--output", str(output))
    which = "it" if folder == output else str(folder)
    assert str(caught.value) == f"--output {output}: {which} is a folder; a file is expected"


def test_a_missing_file_is_named_with_its_option(pair: Pair):
    with pytest.raises(InputError, match=r"--baseline: .*nowhere: No such file"):
        main([*pair.options[:2], "--baseline", "nowhere", "--mode", "evaluate"])


def test_several_ranks_are_for_training(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="--mode decode: one process"):
        main([*pair.options, "--mode", "decode"])


def test_a_run_is_measured_as_its_yaml_says(pair: Pair):
    options = pair.parse("--accumulation", "3", "--seed", "7", "--model.norm_eps", "1e-5")
    run = run_of("config", options, Cell(micro_batch_size=4, compile="on"), world_size=2)
    assert run.training.global_batch_size == 4 * 2 * 3
    assert run.training.accumulation(2) == 3
    assert (run.training.seed, run.training.seq_len) == (7, 16)
    assert (run.model.norm_eps, run.model.r) == (1e-5, 8)
    assert run.execution.compile == "on"
    pair.write("whole", "--config", {}, training__micro_batch_size=None)
    assert run_of("config", pair.parse(), Cell(), world_size=2).training.micro_batch_size == 2


def test_the_same_file_twice_has_two_names(pair: Pair):
    options = parse(["--config", "a.yaml", "--baseline", "b/a.yaml"])
    assert side_names(options) == {"config": "a", "baseline": "a (baseline)"}
    assert asdict(options)["cells"] == [asdict(Cell())]
    assert sys.argv[0] not in pair.options

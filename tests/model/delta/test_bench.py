"""python -m model.delta bench: its sides compute the same, and what it writes was measured."""

import builtins
import json
import runpy
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.errors import InputError
from model.delta import Deltas, LoraConfig, SoraConfig
from model.delta.bench import cases as bench_cases
from model.delta.bench.cases import Case, DifferentOutputError, cases, chain, check, factors, sides
from model.delta.bench.measure import in_blocks, in_turn, measure_case
from model.delta.bench.table import table

main = runpy.run_module("model.delta.__main__", run_name="command")["main"]
SMALL = Case("linear", 16, 4, batched=False, layers=3, r=2)


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["model.delta", "bench", *map(str, words)])
    try:
        assert main() == 0
    finally:
        torch.set_num_threads(threads)


def by_hand(case: Case) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Output, input gradient and those of all A and B, of W + 2 B A multiplied out, in float64."""
    side = sides(case, with_peft=False)["frozen"]
    x = side.x.detach().double().requires_grad_()
    h, leaves = x, []
    for layer, (a, b) in zip(chain(case), factors(case), strict=True):
        W = layer.weight if case.kind == "linear" else layer.B @ layer.A
        leaves += [a.double().requires_grad_(), b.double().requires_grad_()]
        h = h @ (W.double() + 16 / case.r * leaves[-1] @ leaves[-2]).T
    found = torch.autograd.grad(h, [x, *leaves], side.gradient.double())
    return h, found[0], list(found[1:])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["linear", "factorised"])
def test_every_side_computes_what_its_name_says(kind: str, batched: bool):
    case = Case(kind, 16, 4, batched, layers=3, r=2)
    found = sides(case, with_peft=True)
    peft = ["peft lora"] if kind == "linear" else []
    assert list(found) == ["frozen", "lora", "sora", *peft]
    assert check(case, found)["largest_relative_difference"] < 1e-5
    output, dx, gradients = by_hand(case)
    for name in ("lora", "sora", *peft):
        side = found[name]
        torch.testing.assert_close(side.module(side.x).double(), output, rtol=1e-4, atol=1e-4)
        side.forward_backward()
        torch.testing.assert_close(side.x.grad.double(), dx, rtol=1e-4, atol=1e-4)
        mine = [p.grad.double() for p in side.trained if p.dim() == 2]
        for one, wanted in zip(mine, gradients, strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-4)
    assert len(found["sora"].trained) == 9
    assert found["frozen"].trained == []
    assert not any(p.requires_grad for p in found["frozen"].module.parameters())


def test_a_pass_of_inference_makes_no_graph():
    side = sides(SMALL, with_peft=False)["lora"]
    seen = []
    side.module.register_forward_hook(lambda _m, _x, y: seen.append(y.requires_grad))
    side.forward()
    side.forward_backward()
    assert seen == [False, True]


def test_sides_that_differ_are_not_compared():
    found = sides(SMALL, with_peft=True)
    with torch.no_grad():
        found["peft lora"].trained[0].mul_(1.01)
    with pytest.raises(DifferentOutputError, match=r"peft lora differs from lora by 0\.0"):
        check(SMALL, found)
    idle = sides(SMALL, with_peft=False)
    for side in idle.values():
        for parameter in side.trained:
            nn.init.zeros_(parameter)
    with pytest.raises(DifferentOutputError, match="changes nothing"):
        check(SMALL, idle)


def test_times_are_by_side_in_turn_and_each_leads_as_often():
    order: list[str] = []

    class Stub:
        def __init__(self, name: str) -> None:
            self.name = name

        def forward(self) -> None:
            order.append(self.name)
            time.sleep(0.001 if self.name == "a" else 0.003)

    found = in_blocks({n: Stub(n) for n in "abc"}, "forward", 0.05, time.perf_counter)
    assert {np.shape(values) for values in found.values()} == {(20, 1)}
    assert np.min(found["a"]) >= 0.001
    assert np.min(found["b"]) >= 0.003
    blocks = ["".join(order[i : i + 3]) for i in range(18, len(order), 3)]
    assert blocks[:4] == ["abc", "bca", "cab", "abc"]
    busy = in_turn({"a": Stub("a").forward}, 3, time.process_time)["a"]
    assert max(busy) < 0.001  # asleep, the process takes no time of a core


def test_ratios_are_of_the_medians_and_judged_by_their_interval(monkeypatch):
    """Made-up seconds: ours takes 0.6 of peft's in every round."""
    times = {"frozen": 1e-6, "lora": 6e-6, "sora": 9e-6, "peft lora": 10e-6}

    def made_up(found: Any, *_: Any) -> dict[str, list[list[float]]]:
        noise = np.random.RandomState(0).uniform(1, 1.02, (20, 5))
        return {name: (times[name] * noise).tolist() for name in found}

    def wavering(found: Any, *_: Any) -> dict[str, list[list[float]]]:
        draw = np.random.RandomState(1)
        return {name: (times[name] * draw.uniform(0.8, 1.2, (20, 5))).tolist() for name in found}

    monkeypatch.setattr("model.delta.bench.measure.in_blocks", made_up)
    found = measure_case(SMALL, True, 1.0, time.perf_counter)
    ratios = {(r["quantity"], r["mode"]): r for r in found["ratios"]}
    one = ratios["lora / peft lora", "forward"]
    assert one["ratio"] == pytest.approx(0.6)
    assert one["low"] <= 0.6 <= one["high"]
    assert (one["goal_at_most"], one["reached"], one["launch_bound"]) == (0.7, True, True)
    assert ratios["sora / peft lora", "forward"]["reached"] is False
    times["lora"] = 7e-6
    monkeypatch.setattr("model.delta.bench.measure.in_blocks", wavering)
    undecided = measure_case(SMALL, True, 1.0, time.perf_counter)["ratios"][0]
    assert undecided["low"] < 0.7 < undecided["high"]
    assert undecided["reached"] is None
    assert ratios["lora / frozen", "forward"]["goal_at_most"] is None
    row = next(r for r in found["measurements"] if (r["side"], r["mode"]) == ("lora", "forward"))
    assert row["microseconds_a_layer_median"] == pytest.approx(2.02, rel=0.01)
    assert "0.60 [" in table(found["measurements"], found["ratios"], "forward")
    big = Case("linear", 768, 512, batched=False, layers=1, r=2)
    assert not big.launch_bound
    assert big.flops == 2 * 512 * 768**2
    assert Case("factorised", 768, 512, True, 1, 2).flops == 2 * 512 * 128 * 2 * 768


def test_the_command_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    output = tmp_path / "bench.json"
    run(monkeypatch, "--sizes", 12, "--rows", 2, "--layers", 2, "--rank", 2, "--seconds", 0.01,
        "--output", output)  # fmt: skip
    found = json.loads(output.read_text())
    assert len(found["measurements"]) == 2 * 2 * (4 + 3)
    assert len(found["ratios"]) == 2 * 2 * (4 + 2)
    assert all(row["seconds_p10"] <= row["seconds_median"] for row in found["measurements"])
    where = found["environment"]
    assert where["command"] == (
        "python -m model.delta bench --sizes 12 --rows 2 --layers 2 --rank 2 --seconds 0.01 "
        "--threads 1 --clock cpu"
    )
    for key in ("device", "git_commit", "threads", "load_average_1min", "packages", "clock"):
        assert where[key] is not None
    assert where["packages"]["peft"]
    assert "linear, d 12, 2×1 rows" in capsys.readouterr().out


def test_without_peft_frozen_and_ours_are_measured(monkeypatch, tmp_path, capsys):
    real = builtins.__import__

    def no_peft(name: str, *rest: Any, **more: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_peft)
    output = tmp_path / "bench.json"
    run(monkeypatch, "--sizes", 12, "--rows", 2, "--rank", 2, "--seconds", 0.01, "--output", output)
    found = json.loads(output.read_text())
    assert {row["side"] for row in found["measurements"]} == {"frozen", "lora", "sora"}
    assert {row["quantity"] for row in found["ratios"]} == {"lora / frozen", "sora / frozen"}
    assert "peft is not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "3"], "--rows 3: allowed are even"),
        (["--rank", "100"], "--rank 100: with --sizes 64"),
        (["--sizes", "4", "--rank", "2"], "--sizes 4: allowed is at least 6"),
        (["--seconds", "0"], "--seconds 0"),
        (["--threads", "2"], "--clock cpu: with --threads 2"),
        (["--output", "no/such/b.json"], "no/such does not exist"),
        (["--clock", "sun"], "invalid choice"),
    ],
)
def test_options_that_cannot_be_are_refused(monkeypatch, options: list[str], message: str):
    with pytest.raises(InputError, match=message):
        run(monkeypatch, *options)


# --- what the layers compute in one product of flat rows ------------------------------------------


@pytest.mark.parametrize("config", [LoraConfig, SoraConfig])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6), (0, 6), (2, 0, 6)])
@pytest.mark.parametrize("permuted", [False, True])
def test_rows_of_any_shape(config: type[LoraConfig], shape: tuple[int, ...], permuted: bool):
    """Against the formula, also where input and output are not contiguous, and there are none."""
    layer = config(targets=["0"], r=3).build(nn.Identity(), [_target()]).layer("0").double()
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, generator=generator)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    y = torch.randn((*shape[:-1], 4), dtype=torch.float64, generator=generator)
    if permuted:
        x, y = (t.transpose(0, -2).contiguous().transpose(0, -2) for t in (x, y))
    gate = getattr(layer, "gate", torch.ones(3, dtype=torch.float64))
    wanted = y + 16 / 3 * (x @ layer.A.T * gate) @ layer.B.T
    kept = y.clone()
    torch.testing.assert_close(layer(x, y), wanted)
    assert torch.equal(y, kept)


def _target() -> Any:
    from model.delta.target import Target

    return Target("0", nn.Identity(), "linear", 6, 4)


@pytest.mark.parametrize("config", [LoraConfig, SoraConfig])
def test_autocast_and_low_precision_keep_the_outputs_dtype(config: type[LoraConfig]):
    """bf16 of autocast, of the backbone or of its output alone, and float32 under autocast."""
    layer = config(targets=["0"], r=3).build(nn.Identity(), [_target()]).layer("0")
    for seed, parameter in enumerate(layer.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    x, y = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    wanted = layer.double()(x.double(), y.double())
    layer.float()
    for autocast, x_type, y_type in (
        (True, torch.float32, torch.bfloat16),
        (True, torch.float32, torch.float32),
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.bfloat16, torch.bfloat16),
        (False, torch.float32, torch.bfloat16),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = layer(x.to(x_type), y.to(y_type))
        assert found.dtype == y_type
        # three products and sums of bf16, each rounded by 2^-9 of terms up to the output's norm
        assert (found.double() - wanted).norm() / wanted.norm() < 0.02


def test_every_case_of_the_options():
    every = list(cases([64, 256], [8], 4, 2))
    assert len(every) == 2 * 2 * 2
    assert {(c.d, c.kind, c.batched) for c in every} == {
        (d, kind, batched)
        for d in (64, 256)
        for kind in ("linear", "factorised")
        for batched in (False, True)
    }
    assert bench_cases.OF_WIDTH == 6
    deltas = Deltas(chain(every[0]))
    assert deltas.add("a", LoraConfig(targets=["0"], r=2)).num_parameters() == 2 * 2 * 64

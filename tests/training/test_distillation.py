"""Training on from given weights, with a teacher: against a plain loop, at every ZeRO stage, over
micro-batches and ranks, resumed.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from data.command_line import parse_options
from data.loader import WindowLoader
from data.shards import PreparedData
from model import Transformer
from tests.conftest import BIN, Runs, finish, free_port
from tests.training.given import write_checkpoint
from tests.training.oracle import decay
from training import checkpoint
from training.config import RunConfig
from training.distillation import distance, normalised

CPU = torch.device("cpu")
STEPS, WEIGHT = 3, 2.0


class Given(NamedTuple):
    """Metrics of every run by its name, and where things are."""

    folder: Path
    dense: Path
    lpa: Path
    metrics: dict[str, list[dict[str, Any]]]

    def values(self, name: str, key: str) -> list[float]:
        return [line[key] for line in self.metrics[name]]

    def weights(self, name: str) -> dict[str, Tensor]:
        folder = checkpoint.newest(self.folder / name)
        assert folder is not None
        return safetensors.torch.load_file(folder / "model.safetensors")


ALONE: dict[str, dict[str, Any]] = {
    "one": {},
    "first leg": {"training__max_steps": 2},
    "whole": {"deepspeed__zero_stage": 0, "training__micro_batch_size": 8},
    "recomputed": {"deepspeed__zero_stage": 3, "execution__recompute_blocks": True},
    "plain": {"distillation__teacher": None, "distillation__weight": 1.0},
    "watched": {"distillation__weight": 0.0},
    "itself": {"teacher": "lpa", "training__max_steps": 2},
    "itself in bf16": {"teacher": "lpa", "training__max_steps": 2, "training__precision": "bf16"},
    "itself in autocast": {
        "teacher": "lpa", "training__max_steps": 2, "training__precision": "bf16",
        "deepspeed__zero_stage": 0,
    },
    "heavy": {
        "distillation__weight": 50.0, "training__max_steps": 6, "deepspeed__zero_stage": 2,
    },
}  # fmt: skip
TWO_RANKS: dict[str, dict[str, Any]] = {
    "two ranks, stage 3": {"deepspeed__zero_stage": 3},
}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Given:
    """All runs: most of them in one process, those of two ranks in two, one resumed by train.py."""
    folder = tmp_path_factory.mktemp("given")
    dense = write_checkpoint(folder / "dense", prepared, None)
    lpa = write_checkpoint(folder / "lpa", prepared, 8)
    runs = Runs(folder, prepared)

    def config(name: str, changes: dict[str, Any]) -> Path:
        changes = dict(changes)
        base = {
            "training__init_from": str(lpa),
            "distillation__teacher": str({"lpa": lpa}.get(changes.pop("teacher", ""), dense)),
            "distillation__weight": WEIGHT,
            "training__schedule": "constant",
            "training__warmup_steps": 0,
            "training__learning_rate": 2.0e-3,
            "training__max_steps": STEPS,
            "training__micro_batch_size": 4,
            "data__final_split": None,
        }
        return runs.config(name, **(base | changes))

    module = ["-m", "tests.training.several"]
    alone = [str(config(name, changes)) for name, changes in ALONE.items()]
    both = [str(config(name, changes)) for name, changes in TWO_RANKS.items()]
    launcher = [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"]
    for command in ([sys.executable, *module, *alone], [*launcher, *module, *both]):
        finish(runs.launch(command), timeout=600)
    second = config("first leg", {})
    out, _ = finish(runs.start(second), timeout=600)
    assert "resumed from" in out
    assert "step-00000002" in out
    names = (*ALONE, *TWO_RANKS)
    return Given(
        folder, dense, lpa, {name: lines(folder / name / "metrics.jsonl") for name in names}
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def block_outputs(model: Transformer, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the output of each block."""
    found: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda *args: found.append(args[2])) for b in model.layers]
    logits = model(ids)
    for hook in hooks:
        hook.remove()
    return logits, found


def angles(features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """The definition in another form: 2 (1 - cos), in float64, a mean over all tokens."""
    each = [
        2 * (1 - F.cosine_similarity(f.double(), t.double(), dim=-1))
        for f, t in zip(features, targets, strict=True)
    ]
    return torch.stack(each).mean()


def plain_loop(run: RunConfig, given: Given) -> list[dict[str, float]]:
    """The recipe in plain torch, whole batches, without DeepSpeed."""
    model = checkpoint.load_model(given.lpa, CPU, torch.float32).train()
    teacher = checkpoint.load_model(given.dense, CPU, torch.float32)
    training, named = run.training, dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay(n, training)} for n, p in named.items()],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.eps,
    )
    loader = WindowLoader(
        PreparedData.open(run.data.path).split("train"), training.seq_len, training.seed
    )
    size, records = training.global_batch_size, []
    for step in range(STEPS):
        tokens = torch.from_numpy(loader.batch(step * size, size))
        logits, features = block_outputs(model, tokens[:, :-1])
        with torch.no_grad():
            _, targets = block_outputs(teacher, tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        apart = angles(features, targets)
        optimizer.zero_grad()
        (loss + WEIGHT * apart).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
        optimizer.step()
        records.append({"loss": loss.item(), "distance": apart.item(), "norm": norm.item()})
    return records


def load(config: Path, *options: str) -> RunConfig:
    found, _ = parse_options(
        RunConfig, ["--config", str(config), *options], prog="test", description="test"
    )
    return found


def test_the_recipe_is_that_of_a_plain_loop(given: Given):
    expected = plain_loop(load(given.folder / "one/config.yaml"), given)
    assert given.values("one", "loss") == pytest.approx([e["loss"] for e in expected], rel=2e-6)
    apart = [e["distance"] for e in expected]
    assert given.values("one", "distillation_loss") == pytest.approx(apart, rel=1e-5)
    norms = [e["norm"] for e in expected]
    assert given.values("one", "grad_norm") == pytest.approx(norms, rel=2e-5)


@pytest.mark.parametrize("name", ["whole", "recomputed", "two ranks, stage 3"])
def test_micro_batches_ranks_and_stages_change_nothing(name: str, given: Given):
    """Whole batches at stage 0; blocks recomputed at stage 3; two ranks; "one" accumulates."""
    assert given.values(name, "loss") == pytest.approx(given.values("one", "loss"), rel=2e-6)
    for key, tolerance in (("distillation_loss", 1e-5), ("grad_norm", 2e-5)):
        expected = given.values("one", key)
        assert given.values(name, key) == pytest.approx(expected, rel=tolerance), key
    weights = given.weights("one")
    for name_, weight in given.weights(name).items():
        assert (weight - weights[name_]).abs().max() < 2e-5, name_


def test_the_first_loss_is_that_of_the_weights_that_were_given(given: Given):
    run = load(given.folder / "plain/config.yaml")
    stream = PreparedData.open(run.data.path).split("train")
    tokens = torch.from_numpy(WindowLoader(stream, 32, run.training.seed).batch(0, 8))
    model = checkpoint.load_model(given.lpa, CPU, torch.float32)
    with torch.no_grad():
        expected = model(tokens[:, :-1], tokens[:, 1:]).item()
    for name in ("plain", "whole", "heavy", "recomputed", "two ranks, stage 3"):
        assert given.values(name, "loss")[0] == pytest.approx(expected, rel=2e-6)
    assert given.metrics["plain"][0]["lr"] == run.training.learning_rate, "step 0 of the schedule"
    assert "distillation_loss" not in given.metrics["plain"][0]


def test_weight_0_watches_and_changes_nothing(given: Given):
    for key in ("loss", "grad_norm"):
        assert given.values("watched", key) == given.values("plain", key)
    weights = given.weights("plain")
    for name, weight in given.weights("watched").items():
        assert torch.equal(weight, weights[name]), name
    assert given.values("watched", "distillation_loss")[0] > 0.1


@pytest.mark.parametrize("name", ["itself", "itself in bf16", "itself in autocast"])
def test_a_model_is_at_no_distance_from_itself(name: str, given: Given):
    """In each precision the teacher computes as the model does, and there is no gradient."""
    first = given.metrics[name][0]
    assert first["distillation_loss"] == 0.0
    if name == "itself":
        assert first["grad_norm"] == given.metrics["plain"][0]["grad_norm"]
    assert given.metrics[name][-1]["distillation_loss"] > 0, "it moved away"


def test_the_features_come_nearer(given: Given):
    heavy, watched = (given.values(name, "distillation_loss") for name in ("heavy", "watched"))
    assert heavy[0] == pytest.approx(watched[0], rel=1e-6)  # at other ZeRO stages
    assert heavy[-1] < 0.9 * heavy[0]
    assert heavy[STEPS - 1] < watched[STEPS - 1]


def test_a_resumed_run_is_one_that_never_stopped(given: Given):
    for key in ("step", "loss", "distillation_loss", "grad_norm", "lr"):
        assert given.values("first leg", key) == given.values("one", key), key
    weights = given.weights("one")
    for name, weight in given.weights("first leg").items():
        assert torch.equal(weight, weights[name]), name


def test_a_checkpoint_knows_what_its_run_was_given(given: Given):
    first, second = (
        checkpoint.read_state(given.folder / f"first leg/checkpoints/step-0000000{step}")
        for step in (2, 3)
    )
    lpa, dense = (
        checkpoint.read_state(folder)["files"]["model.safetensors"]["sha256"]
        for folder in (given.lpa, given.dense)
    )
    for state in (first, second):
        assert state["init_from"]["sha256"] == lpa
        assert state["init_from"]["path"] == str(given.lpa)
        assert state["teacher_sha256"] == dense
    log = (given.folder / "one/log.txt").read_text()
    assert f"starting from the weights of {given.lpa} (sha256 {lpa})" in log
    assert "teacher_sha256" not in checkpoint.read_state(
        given.folder / "plain/checkpoints/step-00000003"
    )


def test_the_engine_trains_and_saves_no_parameter_of_the_teacher(given: Given):
    assert given.weights("one").keys() == given.weights("plain").keys()
    log = (given.folder / "one/log.txt").read_text()
    count = sum(one.numel() for one in given.weights("plain").values())
    assert f"{count:,} parameters" in log


# --- the distance --------------------------------------------------------------------------------


def features(seed: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(2, 5, 8, generator=generator) for _ in range(3)]


def test_the_distance_is_that_of_directions():
    f, t = features(0), features(1, 30.0)
    assert distance(f, t).item() == pytest.approx(angles(f, t).item(), rel=1e-6)
    assert distance(f, [-3 * one for one in f]).item() == pytest.approx(4, rel=1e-6)
    assert distance(f, f).item() == 0
    assert distance([torch.zeros(1, 1, 8)], [torch.zeros(1, 1, 8)]).item() == 0
    assert normalised(f[0].bfloat16()).dtype == torch.float32


def test_the_gradient_of_the_distance_to_itself_is_zero():
    mine = [one.requires_grad_() for one in features(0)]
    gradients = torch.autograd.grad(distance(mine, [one.detach() for one in mine]), mine)
    assert all(not gradient.any() for gradient in gradients)
    doubles = [one.detach().double().requires_grad_() for one in mine]
    targets = [one.double() for one in features(1)]
    assert torch.autograd.gradcheck(lambda *args: distance(list(args), targets), doubles)

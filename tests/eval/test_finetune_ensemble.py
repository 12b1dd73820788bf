"""Tasks begun from deltas of other tasks: scores, starts, runs and what is left of them."""

import dataclasses
import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from data.errors import InputError
from eval.finetune.backbones import HiddenStates
from eval.finetune.blocks import TextConfig, TuningConfig
from eval.finetune.config import TuneConfig
from eval.finetune.ensemble.__main__ import describe, parse, planned, write
from eval.finetune.ensemble.config import FRESH, HEAD, SCORES, TUNED, EnsembleConfig
from eval.finetune.ensemble.starts import exact
from eval.finetune.ensemble.work import Work, do
from eval.finetune.run import run_all, run_one
from eval.finetune.setup import read_task
from eval.finetune.texts import Encoder
from model.delta import LoraConfig
from model.delta.ensemble import combine
from model.delta.merge import low_rank
from tests.eval.test_finetune import (  # noqa: F401  (fixtures)
    LORA,
    WORDS,
    backbone,
    device,
    write_task,
)
from tests.model.delta.backbones import plain, randomise
from training import checkpoint
from training.signals import StopSignal

DEFINE = {
    "words": {"columns": ["text"]},
    "numbers": {"kind": "regression", "columns": ["text"]},
    "kinds": {"columns": ["text"], "classes": 3},
}
ENDS = {"words": ["yes", "zero"], "numbers": ["low", "high", "middle"], "kinds": ["a", "b", "c"]}


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory,
    backbone: Path,  # noqa: F811
    device: torch.device,  # noqa: F811
) -> Path:
    """A run directory with a short LoRA on each of three tasks."""
    torch.set_num_threads(1)  # products are tiny; `device` puts it back
    data, out = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("sources")
    for task, ends in ENDS.items():
        parts = {}
        for split, count in (("train", 64), ("dev", 32)):
            draw = random.Random(f"{task} {split}")
            rows = []
            for _ in range(count):
                label = draw.randrange(len(ends))
                words = [draw.choice(WORDS) for _ in range(draw.randrange(1, 5))]
                rows.append({"text": " ".join([*words, ends[label]]), "label": label})
            parts[split] = rows
        write_task(data, task, parts)
    config = TuneConfig(
        backbone=str(backbone),
        run_dir=str(out),
        delta=LORA,
        tasks=list(DEFINE),
        data=str(data),
        define=DEFINE,
        texts=TextConfig(max_length=40, end=""),
        tuning=TuningConfig(epochs=3.0, batch_size=16, learning_rate=1e-2, log_every=100),
    )
    assert run_all(config, device, StopSignal())
    return out


def config_of(sources: Path, output: Path, **changes: Any) -> EnsembleConfig:
    fields: dict[str, Any] = {"train_examples": 24, "head_steps": 6, "steps": 3, "batch_size": 8}
    return EnsembleConfig([str(sources)], str(output), **(fields | changes))


STARTS = [FRESH, "equal", "loss", "exact_equal", "best"]


@pytest.fixture(scope="module")
def finished(
    sources: Path,
    device: torch.device,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Work]:
    """Words and numbers held out, with one seed, all done."""
    output = tmp_path_factory.mktemp("ensemble") / "result.json"
    config = config_of(sources, output, tasks=["words", "numbers"], starts=STARTS)
    every = planned(config)
    for work in every:
        assert do(work, device, StopSignal())
    write(config, every, device)
    return {work.task: work for work in every}


def tensors(folder: Path, prefix: str = "delta.") -> dict[str, Tensor]:
    found = load_file(folder / "delta.safetensors")
    return {name.removeprefix(prefix): v for name, v in found.items() if name.startswith(prefix)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


# --- scores --------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A projection with W + s B A multiplied out, of which A and B are leaves."""

    def __init__(self, module: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.register_buffer("W", (module.B @ module.A).detach())
        self.A, self.B, self.scale = nn.Parameter(a.double()), nn.Parameter(b.double()), scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W + self.scale * self.B @ self.A)


class ByHand:
    """A delta's folder on the backbone in float64, without hooks, batches or padding."""

    def __init__(self, checkpoint_folder: Path, folder: Path) -> None:
        cpu = torch.device("cpu")
        self.model = checkpoint.load_model(checkpoint_folder, cpu, torch.float32).double()
        self.model.requires_grad_(False).lm_head = HiddenStates()
        values = {k.removeprefix("layers."): v for k, v in tensors(folder).items()}
        for key in {name.rpartition(".")[0] for name in values}:
            path = key.replace("/", ".")
            module = self.model.get_submodule(path)
            new = Adapted(module, values[f"{key}.A"], values[f"{key}.B"], 16 / LORA["r"])
            self.model.set_submodule(path, new)
        self.head = tensors(folder, "backbone.")["head.weight"].double()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def outputs(self, rows: list[Any]) -> Tensor:
        """(n, outputs)."""
        states = [self.model(torch.tensor([row.ids]))[0, -1] for row in rows]  # no padding
        return torch.stack(states).double() @ self.head.T  # the model hands out float32


def scores_by_hand(kind: str, one: ByHand, target: ByHand, rows: list[Any]) -> dict[str, float]:
    """The paper's formulas for classes; for numbers those of eval/finetune/ensemble/scores.py."""
    parts, norms = [], []
    labels = torch.tensor([row.label for row in rows])
    for first in range(0, len(rows), 8):
        z, mine = one.outputs(rows[first : first + 8]), labels[first : first + 8]
        numbers = kind == "regression"
        loss = F.mse_loss(z[:, 0], mine.double()) if numbers else F.cross_entropy(z, mine)
        gradients = torch.autograd.grad(loss, one.parameters)
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
        parts.append(z.detach())
    z, z_target = torch.cat(parts), target.outputs(rows).detach()
    found = {"grand": torch.tensor(norms).mean()}
    if kind == "regression":
        y, t = z[:, 0], labels.double()
        found |= {
            "loss": ((y - t) ** 2).mean(),
            "el2n": (y - t).abs().mean(),
            "cosine": (y @ t) / (y.norm() * t.norm()),
            "kl": ((z_target[:, 0] - y) ** 2).mean() / 2,
        }
    else:
        p, q = z.softmax(1), z_target.softmax(1)
        onehot = torch.eye(z.size(1), dtype=torch.float64)[labels]
        found |= {
            "loss": -(p.log() * onehot).sum(1).mean(),
            "el2n": (p - onehot).norm(dim=1).mean(),
            "cosine": ((p * onehot).sum(1) / p.norm(dim=1)).mean(),
            "kl": (q * (q.log() - p.log())).sum(1).mean(),
        }
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("task", ["words", "numbers"])
def test_scores_are_those_computed_by_hand(
    finished: dict[str, Work],
    backbone: Path,  # noqa: F811
    task: str,
):
    work = finished[task]
    config = work.run(FRESH, TUNED)
    definition, splits = read_task(config, task)
    encoder = Encoder(checkpoint.load_tokenizer(backbone), config.texts, 64)
    rows = [encoder.encode(one) for one in splits.train]
    assert len(rows) == 24
    target = ByHand(backbone, work.trained(FRESH, TUNED))
    found = work.scores()["scores"]
    assert set(found) == set(SCORES)
    for name in work.sources:
        one = ByHand(backbone, work.trained(f"source-{name}", HEAD))
        expected = scores_by_hand(definition.kind, one, target, rows)
        for method in SCORES:
            # float32 through two layers: about 1e-6 of each output, of order 1
            wanted = pytest.approx(expected[method], rel=1e-4, abs=2e-6)
            assert found[method][name] == wanted, method


def test_weights_are_a_softmax_of_the_scores(finished: dict[str, Work]):
    found = finished["words"].scores()
    for method, sign in {"loss": -1, "kl": -1, "el2n": -1, "cosine": 1, "grand": -1}.items():
        values = torch.tensor([found["scores"][method][n] for n in ("numbers", "kinds")])
        expected = (sign * values.double() / 0.1).softmax(0)
        weights = [found["weights"][method][n] for n in ("numbers", "kinds")]
        assert weights == pytest.approx(expected.tolist(), rel=1e-5)
    assert found["weights"]["equal"] == {"numbers": 0.5, "kinds": 0.5}
    losses = found["scores"]["loss"]
    assert losses[found["best"]] == min(losses.values())


# --- starts --------------------------------------------------------------------------------------


def test_a_start_is_the_weighted_average_of_the_sources(finished: dict[str, Work]):
    work = finished["words"]
    parts = {name: tensors(one.delta) for name, one in work.sources.items()}
    for kind in ("equal", "loss"):
        by = work.scores()["weights"][kind]
        found = tensors(work.folder / kind)
        assert len(found) == 8
        for key, value in found.items():
            expected = sum(by[name] * parts[name][key].double() for name in parts)
            torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)


def test_an_exact_start_is_the_nearest_of_its_rank():
    """With the scale of the parts; against the SVD of the whole sum, in float64."""
    model = plain()
    config = LoraConfig(targets=["first", "second"], r=3, alpha=12.0)
    parts = {}
    for seed, name in enumerate("ab"):
        parts[name] = config.build(model, config.find(model)).double()
        randomise(parts[name], seed)
    by = {"a": 0.25, "b": 0.75}
    found, whole = exact(parts, by), combine(parts, by)
    assert found.config == config
    for path, (b, a) in low_rank(found).items():
        layer = found.layer(path)
        assert layer is not None
        assert (layer.rank, layer.scale) == (3, 4.0)
        wanted = torch.matmul(*low_rank(whole)[path])
        lost = torch.linalg.svdvals(wanted)[3:].norm()
        torch.testing.assert_close((b @ a - wanted).norm(), lost)
        torch.testing.assert_close(layer.A.norm(), layer.B.norm())


def test_one_source_is_itself(sources: Path, device: torch.device, tmp_path: Path):  # noqa: F811
    """Weight 1 is the identity, whatever the score; the exact combination adds the same."""
    two = tmp_path / "two"
    for task in ("words", "numbers"):
        shutil.copytree(sources / task, two / task)
    starts = ["equal", "loss", "grand", "exact_loss"]
    config = config_of(two, tmp_path / "one.json", tasks=["words"], starts=starts)
    (work,) = planned(config)
    assert do(work, device, StopSignal())
    found = work.scores()
    assert all(by == {"numbers": 1.0} for by in found["weights"].values())
    source = tensors(work.sources["numbers"].delta)
    for kind in ("equal", "loss", "grand"):
        assert equal(tensors(work.folder / kind), source)
        assert equal(tensors(work.trained(kind, HEAD)), source)
        assert not equal(tensors(work.trained(kind, TUNED)), source)
    same = tensors(work.folder / "exact_loss")
    for key in {name.rpartition(".")[0] for name in source}:
        product = same[f"{key}.B"] @ same[f"{key}.A"]
        torch.testing.assert_close(product, source[f"{key}.B"] @ source[f"{key}.A"])


# --- runs ----------------------------------------------------------------------------------------


def test_a_head_is_trained_on_a_start_that_stays_and_goes_on_with_it(finished: dict[str, Work]):
    work = finished["words"]
    for name, source in work.sources.items():
        folder = work.trained(f"source-{name}", HEAD)
        assert equal(tensors(folder), tensors(source.delta))
        assert tensors(folder, "backbone.")["head.weight"].shape == (2, 32)
    fresh = tensors(work.trained(FRESH, HEAD))
    assert all(v.count_nonzero() == 0 for k, v in fresh.items() if k.endswith(".B"))
    result = json.loads((work.result_folder("loss", HEAD) / "result.json").read_text())
    assert result["trained_parameters"] == {"delta": 0, "head": 64, "backbone": 0, "total": 64}
    assert (result["steps"], result["best_step"], len(result["validations"])) == (6, 6, 1)
    tuned = json.loads((work.result_folder("best", TUNED) / "result.json").read_text())
    assert tuned["steps"] == 3
    assert tuned["start"] == str(work.trained(f"source-{work.best()}", HEAD))
    assert tuned["trained_parameters"]["delta"] == sum(v.numel() for v in fresh.values())


def test_a_start_brings_the_head_of_its_own_task_alone(
    finished: dict[str, Work],
    device: torch.device,  # noqa: F811
    tmp_path: Path,
):
    """A run of no rate to speak of keeps what it begins with."""
    work = finished["words"]
    heads = {}
    for name, start in {
        "own": work.trained("equal", HEAD),
        "other": work.sources["kinds"].delta,
        "none": work.folder / "equal",
    }.items():
        config = work.run("equal", TUNED)
        tuning = dataclasses.replace(config.tuning, learning_rate=1e-12, weight_decay=0.0)
        config = dataclasses.replace(
            config, run_dir=str(tmp_path / name), start=str(start), tuning=tuning
        )
        assert run_one(config, "words", 0, device, StopSignal())
        best = config.folder("words", 0) / "best" / "delta"
        heads[name] = tensors(best, "backbone.")["head.weight"]
        for key, value in tensors(start).items():
            torch.testing.assert_close(tensors(best)[key], value, rtol=0, atol=1e-9)
    kept = tensors(work.trained("equal", HEAD), "backbone.")["head.weight"]
    torch.testing.assert_close(heads["own"], kept, rtol=0, atol=1e-9)
    assert torch.equal(heads["other"], heads["none"])
    assert not torch.allclose(heads["own"], heads["none"])


def test_the_result_has_each_start_before_and_after(finished: dict[str, Work]):
    work = finished["numbers"]
    output = Path(work.config.output)
    found = json.loads(output.read_text())
    assert list(found["tasks"]) == ["words", "numbers"]
    assert found["tasks"]["numbers"]["metric"] == "pearson"
    for arm in STARTS:
        place = f"source-{work.best()}" if arm == "best" else arm
        for phase, where in ((HEAD, place), (TUNED, arm)):
            result = json.loads((work.result_folder(where, phase) / "result.json").read_text())
            row = found["tasks"]["numbers"]["starts"][arm][phase]
            value = result["test"]["pearson"]
            assert row == {"mean": value, "sd": None, "by_seed": [value]}
    lines = output.with_suffix(".md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2 : 2 + len(STARTS)]] == STARTS
    value = found["tasks"]["numbers"]["starts"]["loss"]["tuned"]["mean"]
    assert lines[2 + STARTS.index("loss")].split("|")[5].strip() == f"{100 * value:.1f}"


def test_what_is_over_is_not_run_again_and_the_rest_goes_on(
    finished: dict[str, Work],
    sources: Path,
    device: torch.device,  # noqa: F811
    tmp_path: Path,
):
    """Stopped by a signal in the second run, and gone on: the bits of a work that never stopped."""
    config = config_of(sources, tmp_path / "parts.json", tasks=["words"], starts=["loss"])
    (work,) = planned(config)
    assert run_one(work.run(FRESH, HEAD), "words", 0, device, StopSignal())
    before = (work.result_folder(FRESH, HEAD) / "result.json").stat().st_mtime_ns
    stop = StopSignal()
    signal.raise_signal(signal.SIGTERM)
    assert not do(work, device, stop)
    assert work.left() == len(work.planned()) - 1 == 5
    assert do(work, device, StopSignal())
    assert (work.result_folder(FRESH, HEAD) / "result.json").stat().st_mtime_ns == before
    assert work.left() == 0
    whole = finished["words"]
    assert equal(tensors(work.trained("loss", TUNED)), tensors(whole.trained("loss", TUNED)))
    assert work.scores() == whole.scores()
    (other,) = planned(dataclasses.replace(config, temperature=0.5))
    with pytest.raises(InputError, match=r"temperature was 0\.1, now it is 0\.5"):
        do(other, device, StopSignal())


def test_list_counts_runs_and_predicts(finished: dict[str, Work], sources: Path, tmp_path: Path):
    config, only_list = parse(
        [str(sources), "--output", str(tmp_path / "x.json"), "--list", "--seeds", "[0, 1]",
         "--tasks", "words", "--steps", "5", "--train_examples", "24"]
    )  # fmt: skip
    assert only_list
    assert config.root == tmp_path / "x"
    every = planned(config)
    text = describe(config, every).splitlines()
    runs = 2 * (2 + 2 + 2 * 8 + 1)
    assert text[2].split()[:3] == ["words", str(runs), str(runs)]
    more = describe(dataclasses.replace(config, steps=50), every).splitlines()
    assert float(more[2].split()[3]) > float(text[2].split()[3])
    done = finished["words"]
    both = [done, finished["numbers"]]
    assert describe(done.config, both).splitlines()[2].split()[1:3] == ["11", "0"]


# --- what is refused -----------------------------------------------------------------------------


def test_sources_that_do_not_fit_are_refused(sources: Path, tmp_path: Path):
    one = tmp_path / "one"
    shutil.copytree(sources / "words", one / "words")
    with pytest.raises(InputError, match=r"runs of 1 tasks .* at least two"):
        planned(config_of(one, tmp_path / "x.json"))
    with pytest.raises(InputError, match="runs of 0 tasks with seed 5"):
        planned(config_of(sources, tmp_path / "x.json", source_seed=5))
    with pytest.raises(InputError, match="tasks: none; the sources have kinds, numbers, words"):
        planned(config_of(sources, tmp_path / "x.json", tasks=["none"]))
    twice = config_of(sources, tmp_path / "x.json")
    twice.sources.append(str(one))
    with pytest.raises(InputError, match=r"words is in .* too"):
        planned(twice)


def test_runs_with_keys_that_are_no_more_are_sources(sources: Path, tmp_path: Path):
    shutil.copytree(sources, tmp_path / "old")
    for path in (tmp_path / "old").glob("*/seed-*/config.yaml"):
        path.write_text(path.read_text() + "save_best: true\n")
    assert len(planned(config_of(tmp_path / "old", tmp_path / "x.json"))) == len(ENDS)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  r: 4", "  r: 2", "delta is .* that of .* is"),
        ("method: lora", "method: sora", r"delta\.method sora; allowed is lora"),
        ("max_length: 40", "max_length: 30", "texts is"),
    ],
)
def test_unlike_sources_are_refused(
    sources: Path, tmp_path: Path, old: str, new: str, message: str
):
    shutil.copytree(sources, tmp_path / "changed")
    path = tmp_path / "changed" / "words" / "seed-0" / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(InputError, match=message):
        planned(config_of(tmp_path / "changed", tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--starts", "some"], "starts: 'some'; allowed are fresh, equal"),
        (["--steps", "0"], "steps: 0"),
        (["--temperature", "0"], "temperature"),
        (["--seeds", "[0, 0]"], "seeds"),
        (["--output", "x.md"], r"output: x\.md; allowed is .* \.json"),
        (["--output", "no/such/x.json"], "no/such does not exist"),
    ],
)
def test_options_that_cannot_be_are_refused(options: list[str], message: str):
    with pytest.raises(InputError, match=message):
        parse(["a", "--output", "x.json", *options])


def test_starts_that_do_not_fit_are_refused(
    finished: dict[str, Work],
    device: torch.device,  # noqa: F811
    tmp_path: Path,
):
    config = dataclasses.replace(finished["words"].run("equal", TUNED), run_dir=str(tmp_path))

    def run(**changes: Any) -> None:
        run_one(dataclasses.replace(config, **changes), "words", 0, device, StopSignal())

    with pytest.raises(InputError, match=r"its delta is LoraConfig.* they must be the same"):
        run(delta=LORA | {"r": 2})
    with pytest.raises(InputError, match=r"start: .*delta\.json: not a delta's"):
        run(start=str(tmp_path / "nothing"))
    for wrong in ({"start": "x"}, {"start": None, "freeze_delta": True}):
        with pytest.raises(ValueError, match=r"with delta\.method full"):
            dataclasses.replace(config, delta={"method": "full"}, **wrong)

"""Fine-tuning as a command: launchers, ZeRO stages on two ranks, peft, Hugging Face, the grid."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from data.errors import InputError
from eval.finetune import loop, peft_bridge
from eval.finetune.attach import attach
from eval.finetune.grid import GridConfig, describe, merged, planned, run_grid
from eval.finetune.heads import TaskModel
from eval.finetune.run import run_one
from eval.finetune.setup import setup
from eval.finetune.table import collect, table
from eval.finetune.tasks import GLUE
from tests.conftest import BIN, Runs, finish, free_port
from tests.eval.test_finetune import (  # noqa: F401  # fixtures
    DEFINE,
    LORA,
    SORA,
    WORDS,
    backbone,
    device,
    make,
    result,
    tasks,
)
from tests.eval.test_finetune_parts import small, tokenizer  # noqa: F401
from training.config import DeepSpeedConfig
from training.signals import StopSignal


@pytest.fixture
def options(backbone: Path, tasks: Path, tmp_path: Path) -> Any:  # noqa: F811
    """A YAML of a short run."""

    def write(name: str, **changes: Any) -> Path:
        fields = {
            "backbone": str(backbone), "run_dir": str(tmp_path / name), "tasks": ["words"],
            "data": str(tasks), "define": DEFINE, "delta": SORA, "sparsity": {"strength": 6.0},
            "texts": {"max_length": 40, "end": ""},
            "tuning": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-2, "log_every": 1},
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(fields | changes))
        return path

    return write


COMMAND = ["-m", "eval.finetune", "--config"]


def test_wrong_input_is_one_line_and_exit_code_2(options: Any, runs: Runs):
    config = options("wrong", tasks=["colla"])
    _, err = finish(runs.launch([sys.executable, *COMMAND, str(config)]), code=2)
    assert err.splitlines()[-1].startswith("error: tasks: 'colla'; known are cola, sst2")
    assert "Traceback" not in err


@pytest.mark.slow
def test_every_zero_stage_on_two_ranks_trains_what_one_process_does(
    options: Any, runs: Runs, tmp_path: Path
):
    """Weights, gates and metrics: the proximal step reaches the fp32 values that ZeRO keeps."""
    config = str(options("sora"))
    finish(runs.launch([sys.executable, *COMMAND, config]), timeout=400)
    for stage in range(4):
        launcher = [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"]
        place = ["--run_dir", str(tmp_path / str(stage)), "--deepspeed.zero_stage", str(stage)]
        finish(runs.launch([*launcher, *COMMAND, config, *place]), timeout=400)
    one, *others = (tmp_path / name / "words" / "seed-0" for name in ("sora", "0", "1", "2", "3"))
    expected = safetensors.torch.load_file(one / "best" / "trained.safetensors")
    closed = {name: value == 0 for name, value in expected.items() if name.endswith(".gate")}
    assert sum(int(one.sum()) for one in closed.values()) > 0
    for other in others:
        found = safetensors.torch.load_file(other / "best" / "trained.safetensors")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(found[name] == 0, value) for name, value in closed.items())
        ranks = [json.loads((run / "ranks.json").read_text()) for run in (one, other)]
        assert ranks[0] == ranks[1]


@pytest.mark.slow
def test_deepspeed_launches_it(options: Any, runs: Runs, tmp_path: Path):
    config = options("launched", deepspeed={"zero_stage": 2}, delta=LORA, sparsity={})
    launcher = [str(BIN / "deepspeed"), "--num_gpus=2", f"--master_port={free_port()}"]
    finish(runs.launch([*launcher, "--module", *COMMAND[1:], str(config)]), timeout=400)
    result = json.loads((tmp_path / "launched" / "words" / "seed-0" / "result.json").read_text())
    assert (result["world_size"], result["zero_stage"]) == (2, 2)
    assert result["test"]["accuracy"] >= 0.95


# --- peft and Hugging Face -----------------------------------------------------------------------


PEFT: dict[str, dict[str, Any]] = {
    "LORA": {"r": 4},
    "ADALORA": {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 4, "deltaT": 2},
    "IA3": {"target_modules": ["gate_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "VERA": {"r": 4},
}


@pytest.mark.parametrize("kind", PEFT)
def test_peft_tunes_our_backbone(make: Any, device: torch.device, backbone: Path, kind: str):  # noqa: F811
    """In the real loop: what is trained is peft's and the head, and nothing else moves."""
    targets = {"target_modules": ["gate_proj", "up_proj"]}
    delta = {"method": "peft", "peft_type": kind} | targets | PEFT[kind]
    config = make(delta, tuning={"epochs": 3.0, "learning_rate": 2e-2})
    assert run_one(config, "words", 0, device, StopSignal())
    found = result(config)
    assert found["trained_parameters"]["delta"] > 0
    assert found["trained_parameters"]["backbone"] == 0
    assert found["test"]["accuracy"] >= 0.9
    tensors = safetensors.torch.load_file(
        config.folder("words", 0) / "best" / "peft" / "adapter_model.safetensors"
    )
    assert any(value.abs().sum() > 0 for value in tensors.values())


ADALORA = {"method": "peft", "peft_type": "ADALORA", "target_modules": ["gate_proj"]} | PEFT[
    "ADALORA"
]


def test_adalora_closes_ranks_by_the_gradients_of_each_step(make: Any, device: torch.device):  # noqa: F811
    """2 of 4 a layer are left; the averages are in the checkpoint: a resumed run has its bits."""
    config = make(ADALORA, tuning={"epochs": 3.0, "checkpoint_every": 7})
    folder, ends = config.folder("words", 0), []
    folder.mkdir(parents=True)
    for start in (0, 7):
        job = setup(config, "words", 0, device)
        assert job.progress.step == start
        assert loop.train(job, StopSignal())
        job.metrics.close()
        parameters = job.engine.model.named_parameters()
        ends.append({name: value.detach() for name, value in parameters if value.requires_grad})
        damaged = folder / "checkpoints" / "step-00000014" / "weights.safetensors"
        damaged.write_bytes(b"damaged")
    whole, resumed = ends
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    closed = [int((value == 0).sum()) for name, value in whole.items() if "lora_E" in name]
    assert len(closed) == 2
    assert sum(closed) == 4


def test_adalora_is_final_at_the_end_without_steps_behind_it(make: Any, device: torch.device):  # noqa: F811
    """tfinal is 0 by default, and peft's final step the one behind the last."""
    config = make(ADALORA | {"tfinal": 0, "deltaT": 5}, tuning={"epochs": 2.0})
    config.folder("words", 0).mkdir(parents=True)
    job = setup(config, "words", 0, device)
    assert loop.train(job, StopSignal())
    job.metrics.close()
    parameters = job.engine.model.named_parameters()
    assert sum(int((p == 0).sum()) for name, p in parameters if "lora_E" in name) == 4


@pytest.mark.parametrize("every", [100, 4], ids=["no allocation before", "three before"])
def test_adalora_makes_its_ranks_final_though_that_step_is_left_out(
    make: Any,  # noqa: F811
    device: torch.device,  # noqa: F811
    every: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Step 14 of 18 is not finite. Ranks that may grow again are in what is written for peft."""
    config = make(ADALORA | {"deltaT": every}, tuning={"epochs": 3.0})
    folder = config.folder("words", 0)
    folder.mkdir(parents=True)
    job = setup(config, "words", 0, device)
    inner, module = job.engine.loss, job.engine.model
    kept: dict[int, int] = {}

    def loss(batch: Any) -> torch.Tensor:
        found = inner(batch)
        return found * torch.inf if job.progress.step == 14 else found

    def best(*_: Any) -> None:
        peft_bridge.save(module.backbone, folder / "peft")
        tensors = safetensors.torch.load_file(folder / "peft" / "adapter_model.safetensors")
        sizes = [value.numel() for name, value in tensors.items() if "lora_E" in name]
        kept[job.progress.step] = sum(sizes)

    monkeypatch.setattr(job.engine, "loss", loss)
    monkeypatch.setattr(loop, "_validate", best)
    assert loop.train(job, StopSignal())
    job.metrics.close()
    assert job.engine.skipped_steps() == 1
    closed = [int((p == 0).sum()) for name, p in module.named_parameters() if "lora_E" in name]
    assert sum(closed) == 4
    assert kept == {6: 8, 12: 8, 18: 4}


def test_adalora_wants_the_runs_own_steps_and_whole_gradients(make: Any, device: torch.device):  # noqa: F811
    config = make(ADALORA | {"init_r": 2})
    with pytest.raises(InputError, match=r"init_r 2 is reduced to target_r 2; allowed is"):
        run_one(config, "words", 0, device, StopSignal())
    config = make(ADALORA | {"total_step": 100})
    with pytest.raises(InputError, match=r"delta\.total_step: 100, but the run has 24 steps"):
        run_one(config, "words", 0, device, StopSignal())
    config = make(ADALORA, "sharded", deepspeed=DeepSpeedConfig(zero_stage=1))
    with pytest.raises(InputError, match=r"deepspeed\.zero_stage: 1, but peft .* allowed is 0"):
        run_one(config, "words", 0, device, StopSignal())


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        ({"peft_type": "LORRA"}, r"delta\.peft_type: 'LORRA'; allowed are"),
        ({"peft_type": "LORA", "rr": 3}, "rr"),
        ({"peft_type": "LORA", "target_modules": ["nowhere"]}, "nowhere"),
    ],
)
def test_what_peft_refuses_is_one_line(tokenizer: Any, delta: dict[str, Any], message: str):  # noqa: F811
    model = TaskModel(small(tokenizer), GLUE["cola"], 0)
    with pytest.raises(InputError, match=message):
        attach(model, {"method": "peft", **delta}, 0, 10)


@pytest.mark.slow
def test_a_model_of_hugging_face_is_tuned(options: Any, runs: Runs, tmp_path: Path, prepared: Path):
    """GPT-2's shape, saved in a folder; its names of modules, its tokenizer."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [
        "<s>",
        "<unk>",
        *["the", "of", "and", "module", "for", "with", "is", "not", "yes", "zero"],
    ]
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    made = Tokenizer(vocabulary)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "gpt2"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = transformers.GPT2Config(
        vocab_size=len(words), n_positions=64, n_embd=32, n_layer=2, n_head=2
    )
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    delta = {"method": "lora", "r": 4, "targets": ["c_attn", "c_fc"]}
    path = options("hf", backbone=f"hf:{folder}", delta=delta, sparsity={})
    finish(runs.launch([sys.executable, *COMMAND, str(path)]), timeout=400)
    result = json.loads((tmp_path / "hf" / "words" / "seed-0" / "result.json").read_text())
    assert result["test"]["accuracy"] >= 0.95


# --- grid and table ------------------------------------------------------------------------------


@pytest.fixture
def grid(backbone: Path, tasks: Path, tmp_path: Path) -> GridConfig:  # noqa: F811
    base = {
        "tasks": ["words", "numbers"], "data": str(tasks), "define": DEFINE, "seeds": [0, 1],
        "texts": {"max_length": 40, "end": ""},
        "tuning": {"epochs": 1, "batch_size": 32, "learning_rate": 1e-2},
    }  # fmt: skip
    methods = {
        "sora": {"delta": SORA, "sparsity": {"strength": 1.0}},
        "head": {"delta": {"method": "head"}, "tuning": {"learning_rate": 0.5}},
    }
    return GridConfig(str(tmp_path / "grid"), {"tiny": str(backbone)}, methods, base)


def test_a_grid_is_run_once_and_makes_a_table(grid: GridConfig, device: torch.device):  # noqa: F811
    order = [(method, task, seed) for _, method, _, task, seed in planned(grid)]
    assert order[:4] == [
        ("sora", "words", 0), ("head", "words", 0), ("sora", "numbers", 0), ("head", "numbers", 0),
    ]  # fmt: skip
    assert "8 of 8 runs are left" in describe(grid)
    assert run_grid(grid)
    times = [path.stat().st_mtime_ns for path in Path(grid.run_dir).glob("**/best.json")]
    assert run_grid(grid)
    assert times == [p.stat().st_mtime_ns for p in Path(grid.run_dir).glob("**/best.json")]
    assert "0 of 8 runs are left" in describe(grid)
    rows = collect([Path(grid.run_dir)])
    assert [row.name for row in rows] == ["tiny/head", "tiny/sora"]
    text = table(rows)
    assert "| words (accuracy) |" in text.replace("  ", "")
    result = json.loads((Path(grid.run_dir) / "tiny/head/words/result.json").read_text())
    accuracy = result["test"]["accuracy"]
    assert f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['sd']:.1f}" in text


def test_cost_counts_passes_tokens_and_stages(grid: GridConfig):
    """By hand for one run of the head: 1 forward pass over 96 and 32 + 32 texts."""
    from eval.finetune.cost import cost_of, lengths_of

    configs = {method: c for _, method, c, task, seed in planned(grid) if task == "words"}
    lengths = lengths_of(configs["head"], "words")
    cost = cost_of(configs["head"], "words", lengths)
    assert cost.steps == 3
    assert cost.tokens == sum(lengths.train)
    assert cost.scored == sum(lengths.val) + sum(lengths.test)
    model, mean = lengths.model, round(sum(lengths.train) / 96)
    d, r, ffn = 32, 8, 48
    forward = 2 * (2 * (8 * d * r + 3 * d * ffn) + 4 * d * (mean + 1) / 2)
    assert forward == model.flops_per_token(mean) - 2 * d * 400
    assert cost.flops == forward * (cost.tokens + cost.scored)
    assert cost_of(configs["sora"], "words", lengths).flops == forward * (
        2 * cost.tokens + cost.scored
    )


def test_blocks_are_merged_and_a_delta_is_replaced():
    base = {"tuning": {"epochs": 1, "seeds": 2}, "delta": {"method": "lora", "r": 4}}
    changed = merged(base, {"tuning": {"epochs": 3}, "delta": {"method": "head"}})
    assert changed == {"tuning": {"epochs": 3, "seeds": 2}, "delta": {"method": "head"}}


def test_results_of_different_configurations_make_no_mean(grid: GridConfig, device: torch.device):  # noqa: F811
    grid.methods = {"head": grid.methods["head"]}
    grid.base = {**grid.base, "tasks": ["words"]}
    assert run_grid(grid)
    path = Path(grid.run_dir) / "tiny/head/words/seed-1/result.json"
    result = json.loads(path.read_text())
    result["identity"]["tuning"]["epochs"] = 9
    path.write_text(json.dumps(result))
    with pytest.raises(InputError, match="tuning differs between seeds"):
        collect([Path(grid.run_dir)])

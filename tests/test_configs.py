"""Every YAML in configs/ is a run that parses and builds, and --dry-run counts what is there."""

import dataclasses
import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data.command_line import parse_options
from model import ModelConfig, Transformer
from training import memory
from training.config import CONFIG_FOLDER, RunConfig, TrainingConfig
from training.dry_run import describe, dry_run

ROOT = CONFIG_FOLDER.parent
DATA_CONFIGS = sorted((CONFIG_FOLDER / "data").glob("*.yaml"))
NAMES = sorted(
    str(path.relative_to(CONFIG_FOLDER))
    for path in CONFIG_FOLDER.rglob("*.yaml")
    if path.parent.name not in ("data", "study", "tune")  # of other commands
)
every_config = pytest.mark.parametrize("name", NAMES)
TWINS = ("tiny", "130m", "370m", "3b")


@functools.cache
def load(name: str | Path, *options: str) -> RunConfig:
    return parse_options(
        RunConfig,
        ["--config", str(name), *options],
        prog="train.py",
        description="",
        config_folder=CONFIG_FOLDER,
    )[0]


def test_the_contract_names_are_there():
    assert set(NAMES) >= {
        f"{kind}_{size}.yaml" for kind in ("lpa", "transformer") for size in TWINS
    }
    assert set(NAMES) >= {f"paper/setting1_370m_{kind}.yaml" for kind in ("transformer", "lpa")}
    assert set(NAMES) >= {
        f"paper/setting2_130m_{kind}.yaml" for kind in ("transformer", "lpa", "low_ffn", "low_all")
    }


@every_config
def test_dry_run_keeps_its_contract(name):
    run = load(name)
    result = json.loads(json.dumps(dry_run(run)))
    with torch.device("meta"):
        built = sum(p.numel() for p in Transformer(run.model).parameters())
    assert result["parameters"] == built
    assert 0 < result["parameters_non_embedding"] < built
    assert result["flops_per_token_forward"] == run.model.flops_per_token(run.training.seq_len)
    assert result["steps"] == run.training.max_steps
    batch = run.training.global_batch_size
    assert result["tokens"] == run.training.max_steps * batch * run.training.seq_len
    by_stage = result["memory_bytes_per_rank"]
    assert set(by_stage) == {"0", "1", "2", "3"}
    for by_ranks in by_stage.values():
        assert {"1", "8", "64"} <= set(by_ranks)
        assert all(isinstance(v, int) and v > 0 for v in by_ranks.values())


@every_config
@pytest.mark.parametrize("ranks", [1, 8])
def test_the_batch_divides(name, ranks):
    training = load(name).training
    accumulation = training.accumulation(ranks)
    micro = training.micro_batch_size or training.global_batch_size // ranks
    assert micro * ranks * accumulation == training.global_batch_size


@every_config
def test_the_resolved_yaml_reads_back_equal(name, tmp_path):
    run = load(name)
    path = tmp_path / "config.yaml"
    path.write_text(run.to_yaml())
    assert load(path) == run
    assert dataclasses.asdict(load(path)) == dataclasses.asdict(run)


@every_config
def test_data_can_be_prepared(name):
    """Each data.path is the output of a file in configs/data."""
    outputs = {yaml.safe_load(path.read_text())["output"] for path in DATA_CONFIGS}
    assert load(name).data.path in outputs


@every_config
def test_the_vocabulary_holds_the_tokenizer(name):
    run = load(name)
    prepared = [yaml.safe_load(path.read_text()) for path in DATA_CONFIGS]
    sizes = [c["vocab_size"] for c in prepared if c["output"] == run.data.path]
    assert run.model.vocab_size >= max(sizes)


def test_no_two_runs_share_a_folder():
    counts = Counter(load(name).training.run_dir for name in NAMES)
    assert [folder for folder, count in counts.items() if count > 1] == []


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in config.items():
        if isinstance(value, dict) and prefix + key != "model.r":
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def differences(first: str, second: str) -> set[str]:
    a, b = (flat(dataclasses.asdict(load(name))) for name in (first, second))
    assert a.keys() == b.keys()
    return {key for key in a if a[key] != b[key]}


@pytest.mark.parametrize("size", TWINS)
def test_twins_differ_in_the_rank_alone(size):
    lpa, vanilla = f"lpa_{size}.yaml", f"transformer_{size}.yaml"
    assert differences(lpa, vanilla) == {"model.r", "training.run_dir"}
    assert load(vanilla).model.r is None
    assert isinstance(load(lpa).model.r, int)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n.startswith("paper/") and not n.endswith("_transformer.yaml")]
)
def test_the_papers_runs_differ_in_the_rank_alone(name):
    setting = "_".join(name.split("_")[:2])
    assert differences(name, f"{setting}_transformer.yaml") == {"model.r", "training.run_dir"}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("transformer_130m.yaml", 134_105_856),
        ("lpa_130m.yaml", 115_231_488),
        ("transformer_370m.yaml", 367_969_280),
        ("lpa_370m.yaml", 317_637_632),
        ("transformer_3b.yaml", 3_235_556_352),
        ("lpa_3b.yaml", 2_530_913_280),
        ("paper/setting1_370m_transformer.yaml", 368_925_952),
        ("paper/setting1_370m_lpa.yaml", 331_126_528),
        ("paper/setting2_130m_transformer.yaml", 134_139_393),
        ("paper/setting2_130m_lpa.yaml", 115_265_025),
        ("paper/setting2_130m_low_ffn.yaml", 116_444_673),
        ("paper/setting2_130m_low_all.yaml", 97_570_305),
    ],
)
def test_parameters_of_the_sizes(name, parameters):
    assert dry_run(load(name))["parameters"] == parameters


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "paper/setting1_370m_lpa.yaml",
            {"global_batch_size": 48, "seq_len": 1024, "learning_rate": 5e-4, "warmup_steps": 1000}
            | {"precision": "fp32"},
        ),
        (
            "paper/setting2_130m_lpa.yaml",
            {"global_batch_size": 512, "seq_len": 256, "learning_rate": 1e-3, "warmup_steps": 0}
            | {"precision": "bf16", "max_steps": 31800},
        ),
    ],
)
def test_the_papers_hyperparameters(name, expected):
    """What the published code has: both settings with seed 27, betas 0.9 and 0.95, no decay."""
    run = load(name)
    both = {"seed": 27, "beta1": 0.9, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.0}
    both |= {"gradient_clipping": 1.0, "schedule": "cosine", "min_learning_rate": 0.0}
    found = dataclasses.asdict(run.training)
    assert {k: found[k] for k in both | expected} == both | expected
    assert run.model.init == "authors"


def test_the_command_line_prints_what_it_writes(tmp_path):
    output = tmp_path / "dry_run.json"
    command = [sys.executable, "train.py", "--config", "lpa_3b.yaml", "--dry-run", "--output"]
    done = subprocess.run(
        [*command, str(output)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(output.read_text())
    assert result["parameters"] == 2_530_913_280
    assert "2,530,913,280" in done.stdout
    lines = done.stdout.splitlines()
    header = next(i for i, line in enumerate(lines) if "ZeRO stage " in line and "GPU" in line)
    assert lines[header].split()[2:] == ["1", "GPU", "8", "GPUs", "64", "GPUs"]
    for line, stage in zip(lines[header + 1 :], "0123", strict=True):
        label, *values = line.split()
        assert label == (f"{stage}*" if stage == "2" else stage)
        by_ranks = result["memory_bytes_per_rank"][stage]
        assert values == [f"{by_ranks[ranks] / 2**30:.2f}" for ranks in ("1", "8", "64")]


# --- memory --------------------------------------------------------------------------------------


def tiny_run(precision: str = "fp32", **changes: Any) -> RunConfig:
    """A run whose model has 2·50·16 + 16 + 4·16² + 3·16·24 + 2·16 = 3,824 parameters."""
    model = ModelConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2
    )
    training = {"run_dir": "x", "max_steps": 1, "global_batch_size": 16, "seq_len": 8}
    training |= {"learning_rate": 1.0, "precision": precision}
    return RunConfig(model, TrainingConfig(**(training | changes)))


P = 3824


@pytest.mark.parametrize(
    ("precision", "stage", "ranks", "weights", "gradients", "optimizer"),
    [
        # At stage 0 fp32 weights and AdamW's two moments, whatever the precision (autocast).
        ("fp32", 0, 8, 4 * P, 4 * P, 8 * P),
        ("bf16", 0, 8, 4 * P, 4 * P, 8 * P),
        # From stage 1 a master copy too: 4 + 4 + 4 bytes, over the ranks.
        ("fp32", 1, 1, 4 * P, 4 * P, 12 * P),
        ("fp32", 1, 8, 4 * P, 4 * P, 12 * P / 8),
        ("bf16", 1, 8, 2 * P, 4 * P, 12 * P / 8),
        ("bf16", 2, 8, 2 * P, 4 * P / 8, 12 * P / 8),
        ("bf16", 3, 8, 2 * P / 8, 4 * P / 8, 12 * P / 8),
        ("fp32", 3, 8, 4 * P / 8, 4 * P / 8, 12 * P / 8),
        ("bf16", 3, 1, 2 * P, 4 * P, 12 * P),
    ],
)
def test_states_by_hand(precision, stage, ranks, weights, gradients, optimizer):
    run = tiny_run(precision)
    assert run.model.num_parameters() == P
    found = memory.state_bytes(run, stage, ranks)
    assert found == {"weights": weights, "gradients": gradients, "optimizer": optimizer}


def test_a_share_is_rounded_up():
    assert memory.state_bytes(tiny_run(), 3, 3)["weights"] == -(-4 * P // 3)


@pytest.mark.parametrize("name", ["lpa_130m.yaml", "lpa_3b.yaml"])
def test_more_sharding_takes_no_more_memory(name):
    by_stage = dry_run(load(name))["memory_bytes_per_rank"]
    for by_ranks in by_stage.values():
        assert by_ranks["1"] >= by_ranks["8"] >= by_ranks["64"]
    for ranks in ("8", "64"):
        assert by_stage["1"][ranks] > by_stage["2"][ranks] > by_stage["3"][ranks]


def test_parts_add_up_to_the_budget():
    result = dry_run(load("lpa_370m.yaml"))
    for stage, by_ranks in result["memory_parts_bytes_per_rank"].items():
        for ranks, parts in by_ranks.items():
            assert set(parts) == {"weights", "gradients", "optimizer", "activations", "logits"}
            assert result["memory_bytes_per_rank"][stage][ranks] == sum(parts.values())


def test_activations_are_those_of_one_micro_batch():
    def activations(ranks: int, **changes: Any) -> int:
        return memory.bytes_per_rank(tiny_run(**changes), 1, ranks)["activations"]

    one = activations(1, micro_batch_size=1)
    assert activations(1, micro_batch_size=4) == 4 * one
    assert activations(8, micro_batch_size=4) == 4 * one
    assert activations(1) == 16 * one
    assert activations(8) == 2 * one
    assert activations(64) == one


def test_the_printed_table_marks_the_stage_of_the_run():
    run = load("lpa_3b.yaml", "--deepspeed.zero_stage", "3")
    marked = [line.split()[0] for line in describe(run, dry_run(run)).splitlines() if "*" in line]
    assert marked == ["3*"]

"""Which checkpoint is taken, which are removed, and what is read from one."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from data.errors import InputError
from data.shards import sha256_file
from model import ModelConfig, Transformer, init_weights
from training import checkpoint


def folder(run_dir: Path, name: str, whole: bool = True) -> Path:
    made = run_dir / "checkpoints" / name
    made.mkdir(parents=True)
    if whole:
        checkpoint.write_state(made, {"files": {}})
    return made


def test_newest_is_by_number_and_whole(tmp_path: Path):
    assert checkpoint.newest(tmp_path) is None
    for name in ("step-00000900", "step-00001000", "step-99999999"):
        folder(tmp_path, name)
    newest = folder(tmp_path, "step-100000000")  # nine digits: first in the order of strings
    folder(tmp_path, "step-200000000", whole=False)
    folder(tmp_path, "step-300000000.partial")
    assert checkpoint.newest(tmp_path) == newest
    assert checkpoint.resolve(tmp_path) == newest
    assert checkpoint.resolve(newest) == newest


@pytest.mark.parametrize(("keep", "left"), [(1, [30]), (2, [20, 30]), (9, [10, 20, 30])])
def test_prune_keeps_the_newest(keep: int, left: list[int], tmp_path: Path):
    for step in (10, 20, 30):
        folder(tmp_path, f"step-{step:08d}")
    checkpoint.prune(tmp_path, None)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    checkpoint.prune(tmp_path, keep)
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == [f"step-{step:08d}" for step in left]


@pytest.mark.parametrize(
    ("every", "left"), [(20, [20, 40, 50]), (50, [50]), (10, [10, 20, 30, 40, 50])]
)
def test_prune_keeps_every_nth(every: int, left: list[int], tmp_path: Path):
    for step in (10, 20, 30, 40, 50):
        folder(tmp_path, f"step-{step:08d}")
    checkpoint.prune(tmp_path, 1, every)
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == [f"step-{step:08d}" for step in left]


def test_clean_removes_what_a_killed_save_left(tmp_path: Path):
    folder(tmp_path, "step-00000001")
    folder(tmp_path, "step-00000001.replaced")
    folder(tmp_path, "step-00000002.replaced")  # killed between the two renames
    folder(tmp_path, "step-00000003.partial", whole=False)
    checkpoint.clean(tmp_path)
    found = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert found == ["step-00000001", "step-00000002"]


def test_resolve_says_what_is_missing(tmp_path: Path):
    with pytest.raises(InputError, match="no such folder"):
        checkpoint.resolve(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no whole checkpoint"):
        checkpoint.resolve(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_loaded_model_is_the_one_written(tied: bool, tmp_path: Path):
    config = ModelConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        r=4,
        tie_embeddings=tied,
    )
    model = Transformer(config)
    init_weights(model, seed=1)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    config.to_json(tmp_path / "model.json")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in tmp_path.iterdir()
    }
    checkpoint.write_state(tmp_path, {"files": files})
    loaded = checkpoint.load_model(tmp_path, torch.device("cpu"), torch.float32)
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids), model.eval()(ids))
    assert (loaded.lm_head.weight is loaded.token_embedding.weight) == tied
    half = checkpoint.load_model(tmp_path, torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_weights_that_do_not_fit_are_refused(trained: Path, tmp_path: Path):
    step = tmp_path / "step"
    shutil.copytree(checkpoint.resolve(trained), step)
    description = json.loads((step / "model.json").read_text())
    description["num_layers"] = 3
    (step / "model.json").write_text(json.dumps(description))
    state = checkpoint.read_state(checkpoint.resolve(trained))
    size = (step / "model.json").stat().st_size
    state["files"]["model.json"] = {"bytes": size, "sha256": sha256_file(step / "model.json")}
    checkpoint.write_state(step, state)
    with pytest.raises(InputError, match=r"do not fit model\.json"):
        checkpoint.load_model(step, torch.device("cpu"), torch.float32)


def test_file_that_went_missing_is_named(trained: Path, tmp_path: Path):
    step = tmp_path / "step"
    shutil.copytree(checkpoint.resolve(trained), step)
    (step / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: is missing"):
        checkpoint.read_state(step)

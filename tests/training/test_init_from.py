"""training.init_from and the block distillation: what is accepted, recorded, refused, counted."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

import train
from data.errors import InputError
from model import ModelConfig
from tests.conftest import Runs
from tests.training.given import dense_model, write_checkpoint, write_run
from tests.training.test_distillation import load
from training import checkpoint, init_from, memory, resume
from training.config import CONFIG_FOLDER, RunConfig
from training.dry_run import describe, dry_run


@pytest.fixture(scope="module")
def lpa(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("lpa") / "lpa", prepared, 8)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "dense", prepared, None)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, runs: Runs) -> Callable[..., str]:
    """The message with which train.py refuses a configuration before it joins a process group."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def not_refused() -> None:
        raise AssertionError("the configuration was not refused")

    monkeypatch.setattr(train.distributed, "init_distributed", not_refused)

    def run(*options: str, **changes: Any) -> str:
        config = runs.config(**changes)
        monkeypatch.setattr("sys.argv", ["train.py", "--config", str(config), *options])
        with pytest.raises(InputError) as caught:
            train.main()
        assert "\n" not in str(caught.value)
        assert not (runs.folder / "run" / "config.yaml").exists()
        return str(caught.value)

    return run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__r": 4}, ["model.r is", "q=8", "q=4"]),
        ({"model__num_layers": 3}, ["model.num_layers is 2 there, 3"]),
        ({"model__norm_eps": 1e-5}, ["model.norm_eps is 1e-06 there, 1e-05"]),
        ({"model__rope_theta": 500.0}, ["model.rope_theta is 10000.0 there, 500.0"]),
        ({"model__qk_norm": True}, ["model.qk_norm is False there, True"]),
        ({"training__resume": "runs/x"}, ["training.init_from", "training.resume runs/x"]),
        ({"training__init_from": "nowhere"}, ["training.init_from: nowhere: no such folder"]),
    ],
)
def test_weights_of_another_model_are_refused(
    changes: dict[str, Any], expected: list[str], lpa: Path, refused: Callable[..., str]
):
    message = refused(**({"training__init_from": str(lpa)} | changes))
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 3}, ["model.num_layers is 3 there, 2"]),
        ({"hidden_size": 16}, ["model.hidden_size is 16 there, 32"]),
        ({"vocab_size": 401}, ["model.vocab_size is 401 there, 400"]),
        ({"max_seq_len": 16}, ["model.max_seq_len is 16", "training.seq_len 32"]),
    ],
)
def test_a_teacher_whose_features_do_not_fit_is_refused(
    changes: dict[str, Any],
    expected: list[str],
    prepared: Path,
    refused: Callable[..., str],
    tmp_path: Path,
):
    teacher = write_checkpoint(tmp_path / "teacher", prepared, None, dense_model(**changes))
    message = refused(distillation__teacher=str(teacher))
    for part in ("distillation.teacher", *expected):
        assert part in message, message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--distillation.teacher", "nowhere"],
            ["distillation.teacher: nowhere", "no such folder"],
        ),
        (["--distillation.weight", "-1"], ["distillation.weight: -1", "at least 0"]),
        (["--distillation.weigth", "1"], ["distillation.weight"]),
    ],
)
def test_bad_distillation(options: list[str], expected: list[str], refused: Callable[..., str]):
    message = refused(*options)
    for part in expected:
        assert part in message, message


@pytest.mark.parametrize("key", ["training__init_from", "distillation__teacher"])
def test_damaged_weights_and_other_tokenizers_are_refused(
    key: str, lpa: Path, refused: Callable[..., str], tmp_path: Path
):
    copy = tmp_path / "copy"
    shutil.copytree(lpa, copy)
    state = json.loads((copy / "checkpoint.json").read_text())
    del state["sha256"]
    checkpoint.write_state(copy, state | {"tokenizer_sha256": "abc"})
    assert "tokenizer_sha256 is abc" in refused(**{key: str(copy)})
    checkpoint.write_state(copy, state)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(content))
    assert "the checkpoint is damaged" in refused(**{key: str(copy)})
    (copy / "model.safetensors").unlink()
    assert "model.safetensors: is missing" in refused(**{key: str(copy)})


def test_tensors_that_are_not_the_models_are_refused(lpa: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(lpa, copy)
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    weights["layers.0.attention.q_proj.A"] = weights["layers.0.attention.q_proj.A"][:4].clone()
    safetensors.torch.save_file(weights, copy / "model.safetensors")
    state = json.loads((copy / "checkpoint.json").read_text())
    del state["sha256"]
    size = (copy / "model.safetensors").stat().st_size
    state["files"]["model.safetensors"]["bytes"] = size
    checkpoint.write_state(copy, state)
    with pytest.raises(InputError, match=r"q_proj.A has the shape \[4, 32\], .* says \[8, 32\]"):
        init_from.find(str(copy), "training.init_from")


def test_how_weights_are_drawn_says_nothing_where_they_are_given(lpa: Path):
    config = ModelConfig.from_json(lpa / "model.json")
    other = dataclasses.replace(config, init="authors", init_std=0.5, zero_init_outputs=True)
    assert init_from.beginning(str(lpa), other).folder == lpa


def test_a_converted_checkpoint_is_not_resumed(lpa: Path, refused: Callable[..., str]):
    message = refused(training__resume=str(lpa))
    assert "no optimizer state" in message
    assert "training.init_from" in message


# --- a run that goes on --------------------------------------------------------------------------


def resumed(runs: Runs, given: str | None, **record: Any) -> resume.Start:
    """Where a run goes on, with training.init_from in its configuration and a record of it in its
    checkpoint.
    """
    write_run(runs.folder / "run", runs.data, **record)
    run = load(runs.config(training__init_from=given, model__init_std=0.08))
    return resume.choose(run, {})


RECORD = {"path": "lpa", "folder": "lpa", "sha256": "abc"}


def test_the_record_is_carried_on(runs: Runs):
    start = resumed(runs, "lpa", init_from=RECORD)  # no folder of that name is needed
    assert (start.step, start.weights, start.notes) == (6, None, [])
    assert start.recorded() == {"began_from": None, "init_from": RECORD}


def test_another_path_has_no_effect_and_is_said(runs: Runs):
    start = resumed(runs, "other", init_from=RECORD)
    assert start.notes == [
        "warning: training.init_from other has no effect: the run began from lpa"
    ]
    assert start.recorded()["init_from"] == RECORD


def test_a_run_that_began_anew_is_not_given_weights_later(runs: Runs):
    with pytest.raises(InputError, match=r"init_from was null, now it is lpa"):
        resumed(runs, "lpa")


@pytest.mark.parametrize(("was", "now"), [(None, "abc"), ("abc", None), ("abc", "def")])
def test_a_teacher_neither_comes_nor_goes(was: str | None, now: str | None, runs: Runs):
    write_run(runs.folder / "run", runs.data, **({"teacher_sha256": was} if was else {}))
    run = load(runs.config(model__init_std=0.08))
    with pytest.raises(InputError, match=f"teacher_sha256 was {was}, now it is {now}"):
        resume.choose(run, {"teacher_sha256": now})
    assert resume.choose(run, {"teacher_sha256": was}).step == 6


def test_a_new_run_says_where_its_weights_are_from(runs: Runs, lpa: Path):
    run = load(runs.config(training__init_from=str(lpa)))
    start = resume.choose(run, {})
    assert (start.folder, start.step, start.weights) == (None, 0, lpa)
    assert str(start).startswith(f"starting from the weights of {lpa} (sha256 ")
    assert str(resume.Start()) == "starting from new weights"
    assert resume.Start().recorded() == {"began_from": None}


# --- the dry run ---------------------------------------------------------------------------------


def test_a_dry_run_names_what_is_given_and_counts_the_teacher(runs: Runs, lpa: Path, dense: Path):
    bare = load(runs.config())
    run = load(runs.config(training__init_from=str(lpa), distillation__teacher=str(dense)))
    found, without = dry_run(run), dry_run(bare)
    assert found["init_from"]["folder"] == str(lpa)
    assert found["teacher"]["folder"] == str(dense)
    assert "init_from" not in without
    assert found["parameters"] == without["parameters"], "the teacher is no part of the model"
    assert f"begins from           {lpa}" in describe(run, found)
    for stage in "0123":
        for ranks in ("1", "8"):
            parts = found["memory_parts_bytes_per_rank"][stage][ranks]
            # fp32. Weights: the embedding 400 · 32; a block has 4 · 32² + 3 · 32 · 48 + 2 · 32. Two
            # blocks' outputs and differences of 2 · 32 tokens.
            weights = 400 * 32 + 2 * (4 * 32**2 + 3 * 32 * 48 + 2 * 32)
            assert parts.pop("teacher") == 4 * weights + 2 * (2 * 32) * 32 * 8
            assert parts == without["memory_parts_bytes_per_rank"][stage][ranks]


def test_a_dry_run_refuses_what_the_run_would(runs: Runs, lpa: Path, dense: Path):
    with pytest.raises(InputError, match=r"model\.r is"):
        dry_run(load(runs.config(training__init_from=str(dense))))
    with pytest.raises(InputError, match=r"distillation\.teacher: nowhere"):
        dry_run(load(runs.config(distillation__teacher="nowhere")))


def test_without_the_keys_nothing_is_asked_of_a_run():
    run = load(CONFIG_FOLDER / "lpa_tiny.yaml")
    assert (run.training.init_from, run.distillation.teacher) == (None, None)
    assert "teacher" not in memory.bytes_per_rank(run, 1, 1)
    assert run.warnings() == []
    changed: RunConfig = load(CONFIG_FOLDER / "lpa_tiny.yaml", "--distillation.weight", "2.0")
    assert changed.warnings() == ["distillation.weight 2.0 has no effect: there is no teacher"]

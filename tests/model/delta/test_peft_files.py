"""peft's file format, in both directions, with stock peft at the other end."""

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from model.delta import Deltas, LoraConfig, SoraConfig, TiedLoraConfig
from model.delta.peft_files import export_peft, import_peft
from tests.model.delta.backbones import gpt2, llama, logits, ours, randomise

MODELS = {"llama": (llama, ["q_proj", "down_proj"]), "gpt2": (gpt2, ["c_attn", "c_proj"])}
each_model = pytest.mark.parametrize(("make", "targets"), MODELS.values(), ids=MODELS)


def tuned(make, config) -> tuple[nn.Module, Deltas]:
    model = make()
    deltas = Deltas(model)
    randomise(deltas.add("a", config))
    return model, deltas.double()


def in_peft(make, folder: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(make(), folder, autocast_adapter_dtype=False))


@each_model
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_a_lora_loads_in_stock_peft(tmp_path: Path, make, targets, scaling):
    config = LoraConfig(targets=targets, r=3, alpha=5.0, scaling=scaling, ranks={targets[1]: 2})
    model, deltas = tuned(make, config)
    export_peft(deltas["a"], tmp_path / "out", model, "some/model")
    torch.testing.assert_close(in_peft(make, tmp_path / "out"), logits(model))
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "some/model"
    back = import_peft(tmp_path / "out", make())
    fresh = make()
    Deltas(fresh).insert("b", back)
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-12, atol=1e-13)


@each_model
def test_a_pruned_sora_loads_in_stock_peft(tmp_path: Path, make, targets):
    model, deltas = tuned(make, SoraConfig(targets=targets, r=5))
    for index, (_, layer) in enumerate(deltas["a"].named_layers()):
        nn.init.zeros_(layer.gate[:index])
    export_peft(deltas["a"], tmp_path / "out", model)
    torch.testing.assert_close(in_peft(make, tmp_path / "out"), logits(model))


@each_model
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 6},
        {"r": 4, "lora_alpha": 6, "use_rslora": True},
        {"r": 4, "rank_pattern": {"TARGET": 2}, "alpha_pattern": {"TARGET": 9}},
        {"r": 4, "lora_dropout": 0.1, "task_type": None},
    ],
)
def test_a_lora_of_peft_is_read(tmp_path: Path, make, targets, options):
    options = {
        key: {targets[0]: value["TARGET"]} if isinstance(value, dict) else value
        for key, value in options.items()
    }
    theirs = peft.get_peft_model(make(), peft.LoraConfig(target_modules=targets, **options))
    theirs = theirs.double().eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path)
    model = make()
    Deltas(model).insert("a", import_peft(tmp_path, model))
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (peft.LoraConfig(target_modules=["q_proj"], use_dora=True), "use_dora"),
        (peft.LoraConfig(target_modules=["q_proj"], bias="all"), "bias 'all'"),
        (
            peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
            "modules_to_save",
        ),
        (peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type IA3"),
    ],
)
def test_what_is_no_plain_lora_is_refused(tmp_path: Path, options, message):
    peft.get_peft_model(llama(), options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        import_peft(tmp_path, llama())


def test_what_peft_cannot_hold_is_refused(tmp_path: Path):
    model, deltas = tuned(ours, TiedLoraConfig(targets=["q_proj"], r=3))
    with pytest.raises(ValueError, match="method tied_lora"):
        export_peft(deltas["a"], tmp_path / "a", model)
    low, deltas = tuned(lambda: ours(r=6), LoraConfig(targets=["q_proj"], r=3))
    with pytest.raises(ValueError, match="factorised"):
        export_peft(deltas["a"], tmp_path / "a", low)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x").touch()
    model, deltas = tuned(ours, LoraConfig(targets=["q_proj"], r=3))
    with pytest.raises(FileExistsError, match="not empty"):
        export_peft(deltas["a"], tmp_path / "b", model)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "only safetensors are read"),
        (lambda f: (f / "adapter_config.json").unlink(), "is missing"),
        (lambda f: (f / "adapter_config.json").write_text("["), "not peft's configuration"),
        (
            lambda f: (f / "adapter_model.safetensors").write_bytes(
                (f / "adapter_model.safetensors").read_bytes()[:-8]
            ),
            "not a whole safetensors",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, damage, message):
    model, deltas = tuned(llama, LoraConfig(targets=["q_proj"], r=3))
    export_peft(deltas["a"], tmp_path / "a", model)
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        import_peft(tmp_path / "a", llama())


def test_another_backbone_is_refused(tmp_path: Path):
    model, deltas = tuned(llama, LoraConfig(targets=["q_proj"], r=3))
    export_peft(deltas["a"], tmp_path / "a", model)
    with pytest.raises(ValueError, match="has no module"):
        import_peft(tmp_path / "a", gpt2())
    wide = llama()
    wide.model.layers[0].self_attn.q_proj = nn.Linear(24, 30)
    with pytest.raises(ValueError, match="the module is 24 -> 30"):
        import_peft(tmp_path / "a", wide)

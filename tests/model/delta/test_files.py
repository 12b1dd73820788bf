"""Deltas on disk: what comes back, and what is refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from model.delta import Deltas, LoraConfig, SoraConfig, TiedLoraConfig
from model.delta.files import fingerprint, load_delta, save_delta
from model.delta.prune import compact
from tests.model.delta.backbones import FAMILIES, logits, ours, randomise

CONFIGS = [
    LoraConfig(targets=["q_proj", "down_proj"], r=3, dropout=0.1),
    SoraConfig(targets=["q_proj"], r=3),
    TiedLoraConfig(targets=["q_proj", "v_proj"], r=3),
]


def saved(folder: Path, config=CONFIGS[0], **changes) -> nn.Module:
    """A backbone of which a delta was saved, with the delta still there."""
    model = ours(torch.float32, **changes)
    deltas = Deltas(model)
    randomise(deltas.add("a", config))
    save_delta(deltas["a"], folder, fingerprint(model), about={"task": "t"})
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda one: one.method)
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_a_delta_comes_back(tmp_path: Path, changes, config):
    model = saved(tmp_path / "a", config, **changes)
    fresh = ours(torch.float32, **changes).eval()
    found = load_delta(tmp_path / "a", fresh)
    assert (found.about, found.extra) == ({"task": "t"}, {})
    assert found.delta.config == config
    Deltas(fresh).insert("b", found.delta)
    assert torch.equal(logits(fresh), logits(model))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_tied_factors_come_back_tied(tmp_path: Path):
    saved(tmp_path / "a", CONFIGS[2])
    delta = load_delta(tmp_path / "a", ours(torch.float32)).delta
    assert len({id(layer.A) for _, layer in delta.named_layers()}) == 1


def test_a_compact_sora_comes_back(tmp_path: Path):
    model = ours(torch.float32)
    deltas = Deltas(model)
    randomise(deltas.add("a", SoraConfig(targets=["q_proj", "v_proj"], r=4)))
    for index, (_, layer) in enumerate(deltas["a"].named_layers()):
        nn.init.zeros_(layer.gate[: index + 1])
    expected = logits(model)
    save_delta(compact(deltas["a"]), tmp_path / "a", fingerprint(model))
    fresh = ours(torch.float32)
    found = load_delta(tmp_path / "a", fresh).delta
    Deltas(fresh).insert("a", found)
    assert [layer.rank for _, layer in found.named_layers()] == [3, 2, 1]
    torch.testing.assert_close(logits(fresh), expected)


def test_what_was_trained_beside_it_comes_along(tmp_path: Path):
    model = ours(torch.float32)
    before = fingerprint(model, ["lm_head"])
    nn.init.ones_(model.lm_head.weight)
    assert fingerprint(model, ["lm_head"]) == before != fingerprint(model)
    delta = Deltas(model).add("a", CONFIGS[0])
    extra = {"lm_head.weight": model.lm_head.weight}
    save_delta(delta, tmp_path / "a", before, trained=["lm_head"], extra=extra)
    found = load_delta(tmp_path / "a", ours(torch.float32))
    assert torch.equal(found.extra["lm_head.weight"], model.lm_head.weight)


def test_a_fingerprint_knows_values_and_not_precision_or_attachments():
    model = ours(torch.float32)
    expected = fingerprint(model)
    Deltas(model).add("a", CONFIGS[0])
    assert fingerprint(model) == expected == fingerprint(ours(torch.float32))
    assert fingerprint(ours(torch.float32).to(torch.bfloat16)) == expected
    assert fingerprint(ours(torch.float32, r=6)) != expected
    with torch.no_grad():
        model.final_norm.weight[3] += 0.1
    assert fingerprint(model) != expected


def test_another_backbone_is_refused(tmp_path: Path):
    saved(tmp_path / "a")
    other = ours(torch.float32)
    nn.init.ones_(other.lm_head.weight)
    with pytest.raises(ValueError, match="belongs to the backbone"):
        load_delta(tmp_path / "a", other)
    load_delta(tmp_path / "a", other, any_backbone=True)
    with pytest.raises(ValueError, match="does not fit this backbone"):
        load_delta(tmp_path / "a", ours(torch.float32, hidden_size=32), any_backbone=True)


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (Path("HOSTILE").touch, ())


def _cut(folder: Path) -> None:
    path = folder / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def _pickled(folder: Path) -> None:
    (folder / "delta.safetensors").write_bytes(pickle.dumps(Hostile()))


def _pickled_with_its_sum(folder: Path) -> None:
    import hashlib

    _pickled(folder)
    blob = (folder / "delta.safetensors").read_bytes()
    _changed(folder, tensors_sha256=hashlib.sha256(blob).hexdigest())


def _changed(folder: Path, **changes) -> None:
    path = folder / "delta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "changed or cut short"),
        (_pickled, "changed or cut short"),
        (_pickled_with_its_sum, "not a safetensors file"),
        (lambda folder: (folder / "delta.safetensors").unlink(), "missing"),
        (lambda folder: (folder / "delta.json").unlink(), "no delta.json"),
        (lambda folder: (folder / "delta.json").write_text("{"), "not the description"),
        (lambda folder: _changed(folder, config=3), "config is 3"),
        (lambda folder: _changed(folder, config={"method": "x"}), "method: 'x'"),
        (lambda folder: _changed(folder, format_version=9), "this code reads 1"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "a")
    damage(tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        load_delta(tmp_path / "a", ours(torch.float32))
    assert not (tmp_path / "HOSTILE").exists()


def test_a_newer_delta_takes_the_place_of_an_older_one(tmp_path: Path):
    saved(tmp_path / "a")
    saved(tmp_path / "a", CONFIGS[1])
    assert load_delta(tmp_path / "a", ours(torch.float32)).delta.config == CONFIGS[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="something else"):
        saved(tmp_path / "b")
    assert (tmp_path / "b" / "thesis.tex").exists()

"""python -m model.delta, on a checkpoint of ours and on a folder of transformers'."""

import json
import resource
import runpy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from data.errors import InputError
from model.delta import DeltaConfig, Deltas, LoraConfig, SoraConfig
from model.delta.command.backbones import load_backbone
from model.delta.files import fingerprint, load_delta, save_delta
from tests.conftest import ROOT
from tests.model.delta.backbones import llama, logits, randomise

main = runpy.run_module("model.delta.__main__", run_name="command")["main"]


@pytest.fixture(params=["ours", "hugging face"])
def backbone(request, tmp_path: Path) -> str:
    """The name of a backbone: an LPA checkpoint of ours, or a Llama's folder."""
    if request.param == "ours":
        return str(request.getfixturevalue("trained"))
    llama().float().save_pretrained(tmp_path / "llama")
    return f"hf:{tmp_path / 'llama'}"


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["model.delta", *map(str, words)])
    assert main() == 0


def saved(backbone: str, folder: Path, config: DeltaConfig, seed: int = 0) -> torch.Tensor:
    """Writes a delta that adds something; logits with it."""
    model = load_backbone(backbone).eval()
    deltas = Deltas(model)
    randomise(deltas.add("a", config), seed, std=0.1)
    if isinstance(config, SoraConfig):
        for index, (_, layer) in enumerate(deltas["a"].named_layers()):
            nn.init.zeros_(layer.gate[: index % 2 + 1])
    save_delta(deltas["a"], folder, fingerprint(model), about={"task": "t"})
    return logits(model).detach()


LORA = LoraConfig(targets=["q_proj", "down_proj"], r=3)
SORA = SoraConfig(targets=["q_proj", "down_proj"], r=4)


def test_merged_weights_are_a_backbone(monkeypatch, tmp_path, backbone):
    wanted = saved(backbone, tmp_path / "a", SORA)
    run(monkeypatch, "merge", "--backbone", backbone, "--delta", tmp_path / "a",
        "--output", tmp_path / "merged")  # fmt: skip
    prefix = "hf:" if backbone.startswith("hf:") else ""
    found = load_backbone(f"{prefix}{tmp_path / 'merged'}").eval()
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-5)
    if not prefix:  # the rank of q has grown from 8 to 8 + 4 in every layer; that of k has not
        assert (found.config.ranks.q, found.config.ranks.k) == (12, 8)


def test_layers_of_unequal_rank_become_equal(monkeypatch, tmp_path, trained):
    config = LoraConfig(targets=["q_proj"], r=3, ranks={"layers.0.attention.q_proj": 1})
    wanted = saved(str(trained), tmp_path / "a", config)
    run(monkeypatch, "merge", "--backbone", trained, "--delta", tmp_path / "a",
        "--output", tmp_path / "merged")  # fmt: skip
    found = load_backbone(str(tmp_path / "merged"))
    assert found.config.ranks.q == 11
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-5)


def test_a_merged_checkpoint_can_be_scored(monkeypatch, tmp_path, trained, prepared):
    saved(str(trained), tmp_path / "a", LORA)
    run(monkeypatch, "merge", "--backbone", trained, "--delta", tmp_path / "a",
        "--output", tmp_path / "merged")  # fmt: skip
    from eval.perplexity import PerplexityConfig, evaluate

    found = evaluate(
        PerplexityConfig(str(tmp_path / "merged"), [str(prepared)], max_tokens=200, device="cpu")
    )
    assert found["tokens"] == 200


def test_pruned_computes_the_same_and_is_smaller(monkeypatch, tmp_path, backbone, capsys):
    wanted = saved(backbone, tmp_path / "a", SORA)
    run(monkeypatch, "prune", "--backbone", backbone, "--delta", tmp_path / "a",
        "--output", tmp_path / "b")  # fmt: skip
    model = load_backbone(backbone).eval()
    loaded = load_delta(tmp_path / "b", model)
    assert (loaded.delta.config.method, loaded.about) == ("lora", {"task": "t"})
    Deltas(model).insert("b", loaded.delta)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    for name in ("a", "b"):
        run(monkeypatch, "count", "--backbone", backbone, "--delta", tmp_path / name,
            "--output", tmp_path / f"{name}.json")  # fmt: skip
    before, after = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("a", "b"))
    gates = sum(kept for kept, _ in before["ranks"].values())
    assert before["parameters_after_pruning"] == after["delta_parameters"] + gates
    assert "after_pruning" in capsys.readouterr().out


def test_to_peft_and_back(monkeypatch, tmp_path):
    llama().float().save_pretrained(tmp_path / "llama")
    name = f"hf:{tmp_path / 'llama'}"
    wanted = saved(name, tmp_path / "a", SORA)
    run(monkeypatch, "export", "--backbone", name, "--delta", tmp_path / "a",
        "--output", tmp_path / "peft")  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(load_backbone(name), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-4, atol=1e-5)
    run(monkeypatch, "import", "--backbone", name, "--adapter", tmp_path / "peft",
        "--output", tmp_path / "b")  # fmt: skip
    model = load_backbone(name).eval()
    Deltas(model).insert("b", load_delta(tmp_path / "b", model).delta)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["exact", "average"])
def test_an_ensemble(monkeypatch, tmp_path, backbone, how):
    for number in range(2):
        saved(backbone, tmp_path / str(number), LORA, seed=number)
    run(monkeypatch, "ensemble", "--backbone", backbone, "--delta", tmp_path / "0", tmp_path / "1",
        "--weights", 0.7, 0.3, "--how", how, "--output", tmp_path / "mix")  # fmt: skip
    model = load_backbone(backbone).eval()
    loaded = load_delta(tmp_path / "mix", model)
    assert loaded.about == {"ensemble_of": ["0", "1"], "weights": [0.7, 0.3]}
    parts = [load_delta(tmp_path / str(n), model).delta for n in range(2)]
    for path, layer in loaded.delta.named_layers():
        if how == "exact":
            changes = [torch.matmul(*part.layer(path).factors()) for part in parts]
            expected = 0.7 * changes[0] + 0.3 * changes[1]
            torch.testing.assert_close(torch.matmul(*layer.factors()), expected)
        else:
            expected = 0.7 * parts[0].layer(path).A + 0.3 * parts[1].layer(path).A
            torch.testing.assert_close(layer.A, expected)


def with_head(backbone: str, folder: Path, seed: int = 0) -> None:
    """A delta as eval.finetune writes one: with its task's head, which replaced the model's."""
    model = load_backbone(backbone)
    deltas = Deltas(model)
    randomise(deltas.add("a", LORA), seed, std=0.1)
    head = {"head.weight": torch.full((2, 8), float(seed))}
    mark = fingerprint(model, ["lm_head"])
    save_delta(deltas["a"], folder, mark, trained=["lm_head"], extra=head, about={"task": "t"})


def test_the_head_of_a_tuned_task_goes_beside_what_is_made_of_its_delta(
    monkeypatch, tmp_path, backbone, capsys
):
    for number in range(2):
        with_head(backbone, tmp_path / str(number), number)
    both = ["--delta", tmp_path / "0", tmp_path / "1"]
    base = ["--backbone", backbone, "--delta", tmp_path / "1", "--output"]
    run(monkeypatch, "merge", *base, tmp_path / "merged")
    assert "head.weight: no part of the backbone" in capsys.readouterr().out
    places = [tmp_path / "merged"]
    prefix = "hf:" if backbone.startswith("hf:") else ""
    assert load_backbone(f"{prefix}{tmp_path / 'merged'}")
    if prefix:
        run(monkeypatch, "export", *base, tmp_path / "peft")
        places.append(tmp_path / "peft")
        peft.PeftModel.from_pretrained(load_backbone(backbone), tmp_path / "peft")
    for place in places:
        found = load_file(place / "trained_beside.safetensors")
        assert torch.equal(found["head.weight"], torch.ones(2, 8))
    run(monkeypatch, "ensemble", "--backbone", backbone, *both, "--output", tmp_path / "mix")
    assert "its head.weight is left out" in capsys.readouterr().out
    model = load_backbone(backbone)
    with torch.no_grad():
        model.lm_head.weight += 1  # it was not there as the deltas were trained
    assert not load_delta(tmp_path / "mix", model).extra
    with pytest.raises(InputError, match=r"both bring head\.weight; merge one of them"):
        run(monkeypatch, "merge", "--backbone", backbone, *both, "--output", tmp_path / "O")
    with pytest.raises(InputError, match=r"both bring head\.weight; merge one of them"):
        run(monkeypatch, "merge", "--backbone", backbone, "--delta", tmp_path / "0", tmp_path / "0",
            "--output", tmp_path / "O")  # fmt: skip
    assert not (tmp_path / "O").exists()


@pytest.mark.parametrize("target", ["lm_head", "q_proj"])
def test_a_module_that_was_trained_along_may_be_a_target(monkeypatch, tmp_path, trained, target):
    """Its values come first, then what the delta adds; of a dense one and of factors."""
    model = load_backbone(str(trained)).eval()
    mark = fingerprint(model, [target])
    deltas = Deltas(model)
    randomise(deltas.add("a", LoraConfig(targets=[target], r=3)), 0, std=0.1)
    extra = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{target}." in f".{name}":
                parameter.mul_(1.5)
                extra[name] = parameter.detach().clone()
    save_delta(deltas["a"], tmp_path / "a", mark, trained=[target], extra=extra)
    wanted = logits(model).detach()
    base = ["--backbone", trained, "--delta", tmp_path / "a", "--output"]
    run(monkeypatch, "merge", *base, tmp_path / "merged")
    found = load_backbone(str(tmp_path / "merged")).eval()
    torch.testing.assert_close(logits(found), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="for which a mixture has no place; merge it instead"):
        run(monkeypatch, "ensemble", *base, tmp_path / "mix")


def test_explain_and_its_json(monkeypatch, tmp_path, backbone, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"method": "lora", "targets": ["q_proj"]}))
    run(monkeypatch, "explain", "--backbone", backbone, "--config", tmp_path / "c.yaml",
        "--set", "r=2", "--output", tmp_path / "o.json")  # fmt: skip
    assert "+ lora" in capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())
    model = load_backbone(backbone)
    delta = Deltas(model).add("a", LoraConfig(targets=["q_proj"], r=2))
    assert found["delta_parameters"] == delta.num_parameters()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explain", "--backbone", "/nowhere"], "/nowhere: no such folder"),
        (
            ["explain", "--backbone", "RUN", "--method", "lora", "--set", "targets=[qproj]"],
            "q_proj",
        ),
        (["explain", "--backbone", "RUN", "--method", "lora", "--set", "r"], "KEY=VALUE"),
        (
            ["explain", "--backbone", "RUN", "--set", "method=lora", "targets=[q_proj"],
            r"--set targets=\[q_proj: \[q_proj is not YAML",
        ),
        (["explain", "--backbone", "RUN", "--set", "method=[1]"], r"method: \[1\]; allowed are"),
        (["count", "--backbone", "RUN", "--delta", "D", "--set", "r=3"], "leave --config"),
        (
            ["ensemble", "--backbone", "RUN", "--delta", "D", "D", "--rank", "-1", "--output",
             "OUT"],
            "rank: -1; allowed is at least 1",
        ),
        (
            ["ensemble", "--backbone", "RUN", "--delta", "D", "D", "--weights", "nan", "1",
             "--output", "OUT"],
            "--weights: nan; allowed are finite numbers",
        ),
        (["explain", "--backbone", "RUN", "--method", "lora", "--set", "r=99"], "r: 99"),
        (["explain", "--backbone", "RUN", "--config", "/none.yaml"], "/none.yaml"),
        (["count", "--backbone", "RUN"], "one of them is needed"),
        (["count", "--backbone", "RUN", "--delta", "/none"], "no delta.json"),
        (["merge", "--backbone", "RUN", "--delta", "D"], "--output"),
        (["merge", "--backbone", "RUN", "--delta", "D", "--output", "."], "it exists"),
        (["prune", "--backbone", "RUN", "--delta", "D", "--output", "OUT"], "only SoRA"),
        (["export", "--backbone", "RUN", "--delta", "D", "--output", "OUT"], "factorised"),
        (["import", "--backbone", "RUN", "--adapter", "D", "--output", "OUT"], "adapter_config"),
        (
            ["ensemble", "--backbone", "RUN", "--delta", "D", "--weights", "1", "2", "--output",
             "OUT"],
            "2 of them, and 1 deltas",
        ),
        (["fly", "--backbone", "RUN"], "invalid choice"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, tmp_path, trained, words, message):
    saved(str(trained), tmp_path / "D", LORA)
    names = {"RUN": trained, "D": tmp_path / "D", "OUT": tmp_path / "OUT"}
    with pytest.raises(InputError, match=message) as error:
        run(monkeypatch, *(names.get(word, word) for word in words))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "OUT").exists()


def test_another_backbones_delta_is_refused(monkeypatch, tmp_path, trained):
    saved(str(trained), tmp_path / "D", LORA)
    fields = json.loads((tmp_path / "D" / "delta.json").read_text())
    fields["backbone_fingerprint"] = "0" * 64
    (tmp_path / "D" / "delta.json").write_text(json.dumps(fields))
    words = ["merge", "--backbone", trained, "--delta", tmp_path / "D", "--output", tmp_path / "O"]
    with pytest.raises(InputError, match="belongs to the backbone"):
        run(monkeypatch, *words)
    run(monkeypatch, *words, "--any_backbone")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, trained):
    """A limit on the size of a file stands for the disk's end."""
    saved(str(trained), tmp_path / "D", LORA)
    before = sorted(tmp_path.iterdir())
    words = ["--backbone", str(trained), "--delta", str(tmp_path / "D"), "--output"]
    done = subprocess.run(
        [sys.executable, "-m", "model.delta", "merge", *words, str(tmp_path / "OUT")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "OUT" in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_the_process_ends_with_code_2_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "model.delta", "explain", "--backbone", "/nowhere"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr

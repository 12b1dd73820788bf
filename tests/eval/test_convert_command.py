"""The command eval.convert: folders that transformers wrote, our checkpoints, what it writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from data.command_line import parse_options
from data.errors import InputError
from eval import perplexity
from eval.convert import __main__ as command
from eval.convert import write
from eval.convert.build import paths
from eval.convert.options import ConvertConfig
from model import ModelConfig, Ranks
from tests.conftest import VOCAB
from training import checkpoint

CPU = torch.device("cpu")
IDS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))


def save_llama(
    folder: Path, prepared: Path, shard: str = "1GB", **changes: Any
) -> LlamaForCausalLM:
    """A random LlamaForCausalLM as transformers saves it, and the tokenizer of `prepared`."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()
    with torch.no_grad():  # a norm of ones would hide that it is left out
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=shard)
    shutil.copyfile(prepared / "tokenizer.model", folder / "tokenizer.model")
    return model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "hf"
    save_llama(folder, prepared)
    return folder


def options(*argv: Any) -> ConvertConfig:
    found, _ = parse_options(ConvertConfig, list(map(str, argv)), prog="convert", description="")
    return found


def convert(*argv: Any) -> dict[str, Any]:
    return command.run(options(*argv))


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return checkpoint.load_model(folder, CPU, torch.float32)(IDS)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"shard": "20KB"},
        {"head_dim": 6, "num_key_value_heads": 4, "rope_theta": 500.0},
        {"dtype": torch.bfloat16},
    ],
    ids=["grouped", "tied", "sharded", "wide heads", "bfloat16"],
)
def test_a_dense_conversion_has_the_logits_of_transformers(
    changes: dict[str, Any], tmp_path: Path, prepared: Path
):
    dtype = changes.pop("dtype", torch.float32)
    if "rope_theta" in changes:
        changes["rope_parameters"] = {
            "rope_type": "default",
            "rope_theta": changes.pop("rope_theta"),
        }
    theirs = save_llama(tmp_path / "hf", prepared, **changes)
    if dtype is torch.bfloat16:
        theirs.to(dtype).save_pretrained(tmp_path / "hf")
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert ("shard" in changes) == (tmp_path / "hf/model.safetensors.index.json").exists()
    convert("--from_llama", tmp_path / "hf", "--output", tmp_path / "out")
    with torch.no_grad():
        expected = theirs(IDS).logits
    assert expected.std() > 1
    # Both in float32, whose sums run in other orders: see tests/model/test_transformer.py.
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)


def test_an_older_config_means_what_transformers_reads_in_it(tmp_path: Path, prepared: Path):
    save_llama(tmp_path / "hf", prepared, num_key_value_heads=4)
    path = tmp_path / "hf/config.json"
    config = json.loads(path.read_text())
    for key in ("rope_parameters", "num_key_value_heads", "head_dim", "tie_word_embeddings",
                "attention_bias", "mlp_bias"):  # fmt: skip
        del config[key]
    path.write_text(json.dumps(config | {"rope_theta": 700.0, "rope_scaling": None}))
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert theirs.config.rope_parameters["rope_theta"] == 700.0
    convert("--from_llama", tmp_path / "hf", "--output", tmp_path / "out")
    with torch.no_grad():
        expected = theirs(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-4)
    path.write_text(json.dumps(config))
    convert("--from_llama", tmp_path / "hf", "--output", tmp_path / "no theta")
    assert ModelConfig.from_json(tmp_path / "no theta/model.json").rope_theta == 10000.0


@pytest.mark.parametrize("method", ["svd", "fwsvd"])
def test_full_ranks_keep_the_logits(method: str, llama: Path, tmp_path: Path, prepared: Path):
    """To rounding: a factor of float32 is off by 2^-24 of itself, and B A adds up 16 or 32 of
    them; fwsvd multiplies and divides by weights, which differ by a factor of some tens here.
    """
    data = ["--data", prepared, "--calibration_tokens", 512, "--max_tokens", 64]
    ranks = "{q: 32, k: 16, v: 16, o: 32, ffn: 32}"
    whole = ["--from_llama", llama, "--rank", ranks, "--method", method, *data]
    result = convert(*whole, "--output", tmp_path / "out")
    convert("--from_llama", llama, "--output", tmp_path / "dense")
    dense = logits(tmp_path / "dense")
    torch.testing.assert_close(logits(tmp_path / "out"), dense, rtol=0, atol=1e-4)
    assert max(row["relative_error"] for row in result["projections"]) < 2e-6
    assert all(row["kept_energy"] == pytest.approx(1) for row in result["projections"])


def test_scores_are_those_of_eval_perplexity(llama: Path, tmp_path: Path, prepared: Path):
    report = tmp_path / "report.json"
    arguments = ["--from_llama", llama, "--rank", "6", "--data", prepared, "--seq_len", "32"]
    argv = [*map(str, arguments), "--output", str(tmp_path / "out"), "--report", str(report)]
    result = convert(*argv)
    convert("--from_llama", llama, "--seq_len", "32", "--output", tmp_path / "dense")
    for when, folder in (("before", "dense"), ("after", "out")):
        config = perplexity.PerplexityConfig(str(tmp_path / folder), [str(prepared)], device="cpu")
        expected = perplexity.evaluate(config)
        for key in ("loss_nats_per_token", "perplexity", "bits_per_byte", "tokens", "bytes"):
            assert result["scores"][when][key] == pytest.approx(expected[key], rel=1e-9), key
    assert result["scores"]["after"]["loss_nats_per_token"] != pytest.approx(
        result["scores"]["before"]["loss_nats_per_token"], rel=1e-4
    )


def test_what_is_written_is_a_checkpoint_of_ours(llama: Path, tmp_path: Path):
    convert("--from_llama", llama, "--rank", "{q: 5, v: 3}", "--output", tmp_path / "out")
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "checkpoint.json", "model.json", "model.safetensors", "tokenizer.model",
    }  # fmt: skip
    state = checkpoint.read_state(out)
    assert (state["step"], state["tokens"]) == (0, 0)
    assert state["converted"]["from"] == str(llama)
    assert state["converted"]["method"] == "svd"
    config = ModelConfig.from_json(out / "model.json")
    assert config.ranks == Ranks(q=5, v=3)
    weights = safetensors.torch.load_file(out / "model.safetensors")
    assert sum(one.numel() for one in weights.values()) == config.num_parameters()
    assert all(one.dtype == torch.float32 for one in weights.values())
    assert checkpoint.load_tokenizer(out).vocab_size == VOCAB
    theirs = safetensors.torch.load_file(llama / "model.safetensors")
    for number in range(2):
        ours = weights[f"layers.{number}.attention.o_proj.weight"]
        assert torch.equal(ours, theirs[f"model.layers.{number}.self_attn.o_proj.weight"])


def test_the_report_counts_what_is_there(llama: Path, tmp_path: Path, capsys: Any):
    report = tmp_path / "report.json"
    argv = ["--from_llama", llama, "--rank", "8", "--output", tmp_path / "out", "--report", report]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["eval.convert", *map(str, argv)])
        assert command.main() == 0
    found = json.loads(report.read_text())
    dense = ModelConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
        num_kv_heads=2,
    )  # fmt: skip
    assert found["parameters_before"] == dense.num_parameters()
    after = ModelConfig.from_json(tmp_path / "out/model.json")
    assert found["parameters_after"] == after.num_parameters()
    assert found["flops_per_token_forward_after"] == after.flops_per_token(found["seq_len"])
    rows = found["projections"]
    assert len(rows) == 2 * 7 == len(paths(after))
    # q and o 32 x 32, k and v 16 x 32: rank 8 has 8 (32 + 32) and 8 (16 + 32) parameters.
    counts = {
        row["projection"]: (row["parameters_before"], row["parameters_after"]) for row in rows
    }
    assert counts["q_proj"] == counts["o_proj"] == (1024, 512)
    assert counts["k_proj"] == counts["v_proj"] == (512, 384)
    assert counts["up_proj"] == (1536, 1536)
    assert found["parameters_attention_after"] == 2 * 2 * (512 + 384)
    for row in rows:
        assert row["flops_per_token_after"] == 2 * row["parameters_after"]
        assert row["weighted_relative_error"] is None
        whole = row["rank"] is None
        assert (row["relative_error"] == 0) == whole
        assert row["kept_energy"] == pytest.approx(1 - row["relative_error"] ** 2, abs=1e-6)
    out = capsys.readouterr().out
    assert "q_proj" in out
    assert f"{found['parameters_after']:,}" in out


def test_a_budget_is_kept_and_loses_less_than_one_rank_for_all(llama: Path, tmp_path: Path):
    one = convert("--from_llama", llama, "--rank", "8", "--output", tmp_path / "one")
    share = one["parameters_attention_after"] / one["parameters_attention_before"]
    arguments = ["--from_llama", llama, "--parameter_budget", share]
    found = convert(*arguments, "--output", tmp_path / "budget")
    assert found["parameters_attention_after"] <= one["parameters_attention_after"]

    def squared(result: dict[str, Any]) -> float:
        weights = safetensors.torch.load_file(llama / "model.safetensors")
        return sum(
            (row["relative_error"] * float(weights[name].norm())) ** 2
            for row in result["projections"]
            if row["rank"]
            for name in [f"model.layers.{row['layer']}.self_attn.{row['projection']}.weight"]
        )

    assert squared(found) <= squared(one)
    assert found["ranks"]["ffn"] is None


def test_fisher_weights_change_what_is_kept(llama: Path, tmp_path: Path, prepared: Path):
    data = ["--data", prepared, "--calibration_tokens", 512, "--max_tokens", 64]
    whole = ["--from_llama", llama, "--rank", 6, "--method", "fwsvd", *data]
    weighted = convert(*whole, "--output", tmp_path / "fwsvd")
    plain = convert("--from_llama", llama, "--rank", 6, "--output", tmp_path / "svd")
    assert weighted["calibration_tokens"] == 512
    pairs = zip(weighted["projections"], plain["projections"], strict=True)
    for one, other in pairs:
        if one["rank"]:
            assert one["relative_error"] > other["relative_error"], "no other rank 6 loses less"
            assert one["weighted_relative_error"] < one["relative_error"]


def test_our_own_vanilla_checkpoint_is_converted(llama: Path, tmp_path: Path):
    convert("--from_llama", llama, "--output", tmp_path / "dense")
    direct = convert("--from_llama", llama, "--rank", "4", "--output", tmp_path / "direct")
    result = convert(
        "--checkpoint", tmp_path / "dense", "--rank", "4", "--output", tmp_path / "out"
    )
    assert result["projections"] == direct["projections"]
    one, other = (
        safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        for name in ("direct", "out")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with pytest.raises(InputError, match=r"model.r is 4, it is low-dimensional already"):
        convert("--checkpoint", tmp_path / "out", "--output", tmp_path / "again")


def test_a_rank_that_saves_nothing_is_said(llama: Path, tmp_path: Path, capsys: Any):
    convert("--from_llama", llama, "--rank", "{q: 16, k: 10}", "--output", tmp_path / "out")
    err = capsys.readouterr().err
    # 16 (32 + 32) = 32 · 32, and 10 (16 + 32) < 16 · 32
    assert "rank 16 of q_proj saves nothing: its factors have 1,024 parameters" in err
    assert "k_proj" not in err
    convert("--from_llama", llama, "--output", tmp_path / "dense")
    assert "no projection is factorised" in capsys.readouterr().err


# --- bad input -----------------------------------------------------------------------------------


@pytest.fixture
def broken(llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the folder whose config.json is changed; None takes a key away."""

    def make(**changes: Any) -> Path:
        folder = tmp_path / "hf"
        shutil.copytree(llama, folder)
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        return folder

    return make


def refusal(*argv: Any) -> str:
    with pytest.raises(InputError) as caught:
        convert(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"architectures": ["MistralForCausalLM"]},
            ["architectures", "Mistral", "LlamaForCausalLM"],
        ),
        ({"architectures": None}, ["architectures is missing"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"attention_bias": True}, ["attention_bias", "True", "false"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, ["rope_type 'llama3'"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "'linear'"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor 0.5"]),
        ({"rms_norm_eps": None}, ["the key rms_norm_eps is missing"]),
        ({"num_hidden_layers": None}, ["the key num_hidden_layers is missing"]),
        ({"num_hidden_layers": 3}, ["tensor model.layers.2.input_layernorm.weight is missing"]),
        ({"num_hidden_layers": 1}, ["no place for the tensor model.layers.1.input_layernorm"]),
        ({"intermediate_size": 40}, ["mlp.gate_proj.weight has the shape (48, 32)", "(40, 32)"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads: 3", "4"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'"]),
    ],
)
def test_what_our_model_cannot_express_is_refused(
    changes: dict[str, Any], expected: list[str], broken: Callable[..., Path], tmp_path: Path
):
    folder = broken(**changes)
    message = refusal("--from_llama", folder, "--rank", "4", "--output", tmp_path / "out")
    for part in (str(folder), *expected):
        assert part in message, message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--rank", "17"], ["--rank: rank 17 of k_proj", "1 to 16"]),
        (["--rank", "0"], ["--rank", "greater than 0"]),
        (["--rank", "{q: -1}"], ["--rank.q: -1"]),
        (["--parameter_budget", "0"], ["--parameter_budget", "over 0"]),
        (["--parameter_budget", "0.01"], ["--parameter_budget", "0.01", "rank 1"]),
        (["--parameter_budget", "0.5", "--rank", "4"], ["--parameter_budget", "--rank"]),
        (["--method", "fwsvd"], ["fwsvd", "--data"]),
        (["--method", "asvd"], ["method", "asvd", "fwsvd"]),
        (["--tokenizer", "nowhere.model"], ["nowhere.model", "no such file"]),
        (["--seq_len", "65"], ["--seq_len: 65", "64"]),
        (["--checkpoint", "x"], ["--from_llama, --checkpoint: both"]),
        (["--data", "nowhere"], ["nowhere", "no such folder"]),
    ],
)
def test_options_that_do_not_fit(argv: list[str], expected: list[str], llama: Path, tmp_path: Path):
    message = refusal("--from_llama", llama, *argv, "--output", tmp_path / "out")
    for part in expected:
        assert part in message, message
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written(llama: Path, tmp_path: Path):
    (tmp_path / "there").mkdir()
    assert "it exists" in refusal("--from_llama", llama, "--output", tmp_path / "there")
    message = refusal("--from_llama", llama, "--output", tmp_path / "no/such/out")
    assert "does not exist" in message
    out = ["--from_llama", llama, "--output", tmp_path / "out", "--report"]
    assert f"--report {tmp_path}: it is a folder" in refusal(*out, tmp_path)
    message = refusal(*out, tmp_path / "no/report.json")
    assert f"--report {tmp_path}/no/report.json: the folder" in message
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_named(llama: Path, tmp_path: Path):
    folder = tmp_path / "hf"
    shutil.copytree(llama, folder)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] = torch.nan
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = refusal("--from_llama", folder, "--rank", "4", "--output", tmp_path / "out")
    assert f"{folder}: layers.1.attention.v_proj.weight has values that are not finite" in message


def test_other_weights_than_safetensors_are_not_read(llama: Path, tmp_path: Path):
    folder = tmp_path / "hf"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal("--from_llama", folder, "--output", tmp_path / "out")
    assert "only safetensors are read" in message
    (folder / "model.safetensors").write_bytes(b"\x80\x04not safetensors")
    message = refusal("--from_llama", folder, "--output", tmp_path / "out")
    assert "not a safetensors file" in message


def test_an_index_names_plain_files(llama: Path, tmp_path: Path):
    folder = tmp_path / "hf"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../model.safetensors"}}))
    message = refusal("--from_llama", folder, "--output", tmp_path / "out")
    assert "a plain name is expected" in message


def test_another_tokenizer_than_the_datas_is_refused(llama: Path, tmp_path: Path, prepared: Path):
    from data.tokenizer import train_tokenizer

    other = tmp_path / "other.model"
    train_tokenizer([f"some words {n} of another text, {n * n}" for n in range(400)], other, 300)
    arguments = ["--from_llama", llama, "--tokenizer", other, "--data", prepared]
    message = refusal(*arguments, "--output", tmp_path / "out")
    assert "its tokenizer" in message
    convert("--from_llama", llama, "--tokenizer", other, "--output", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.model").read_bytes() == other.read_bytes()


def test_nothing_half_written_stays(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # what it raises

    monkeypatch.setattr(write.safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match=r"--output .*No space left"):
        convert("--from_llama", llama, "--rank", "4", "--output", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []

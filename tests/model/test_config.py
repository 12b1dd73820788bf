"""Counts against numbers that were worked out elsewhere, and every refusal of ModelConfig."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model import ModelConfig, Ranks, Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_layers": 3,
    "num_heads": 4,
    "max_seq_len": 128,
}
SETTING_1 = {
    "family": "paper-1",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_layers": 24,
    "num_heads": 8,
    "max_seq_len": 1024,
}
SETTING_2 = {
    "vocab_size": 32001,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "lm_head_bias": True,
}
SIZE_130M = SETTING_2 | {"vocab_size": 32000, "lm_head_bias": False}
SIZE_370M = SIZE_130M | {
    "hidden_size": 1024,
    "intermediate_size": 2736,
    "num_layers": 24,
    "num_heads": 16,
}
SIZE_3B = SIZE_130M | {
    "hidden_size": 3072,
    "intermediate_size": 7680,
    "num_layers": 28,
    "num_heads": 24,
}
FFN_LOW_1, FFN_LOW_2 = Ranks(ffn=768), Ranks(ffn=384)
ALL_LOW_1 = Ranks(q=320, k=320, v=320, o=320, ffn=768)
ALL_LOW_2 = Ranks(q=128, k=128, v=128, o=128, ffn=384)


def small(**changes: Any) -> ModelConfig:
    return ModelConfig(**(SMALL | changes))


def on_meta(config: ModelConfig) -> Transformer:
    with torch.device("meta"):
        return Transformer(config)


# Totals and totals without embeddings of the authors' models, and the default sizes.
@pytest.mark.parametrize(
    ("shape", "changes", "total", "body"),
    [
        (SETTING_1, {}, 368_925_952, 302_309_376),
        (SETTING_1, {"r": 320}, 331_126_528, 264_509_952),
        (SETTING_1, {"r": FFN_LOW_1}, 356_263_168, None),
        (SETTING_1, {"r": ALL_LOW_1}, 318_463_744, None),
        (SETTING_2, {}, 134_139_393, 84_953_856),
        (SETTING_2, {"r": 128}, 115_265_025, 66_079_488),
        (SETTING_2, {"r": FFN_LOW_2}, 116_444_673, None),
        (SETTING_2, {"r": ALL_LOW_2}, 97_570_305, None),
        (SETTING_2, {"r": 128, "intermediate_size": 2730}, 134_120_961, None),
        (SETTING_2, {"r": 128, "intermediate_size": 2688}, 132_959_745, None),
        (SETTING_2, {"r": 256}, 124_702_209, None),
        (SIZE_130M, {}, 134_105_856, 84_953_856),
        (SIZE_130M, {"r": 128}, 115_231_488, 66_079_488),
        (SIZE_370M, {}, 367_969_280, None),
        (SIZE_370M, {"r": 256}, 317_637_632, None),
        (SIZE_3B, {}, 3_235_556_352, None),
        (SIZE_3B, {"r": 512}, 2_530_913_280, None),
    ],
)
def test_parameters_are_the_known_ones(shape, changes, total, body):
    config = ModelConfig(**(shape | changes))
    parameters = dict(on_meta(config).named_parameters())
    assert sum(p.numel() for p in parameters.values()) == total
    assert config.num_parameters() == total
    outside = ("token_embedding.", "position_embedding.", "lm_head.")
    inside = sum(p.numel() for n, p in parameters.items() if not n.startswith(outside))
    assert config.num_parameters(embeddings=False) == inside
    if body is not None:
        assert inside == body


@pytest.mark.parametrize(
    ("r", "millions"),
    [
        (32, 108.19),
        (64, 110.55),
        (96, 112.91),
        (128, 115.27),
        (192, 119.98),
        (256, 124.70),
        (320, 129.42),
        (384, 134.14),
    ],
)
def test_parameters_by_rank(r, millions):
    config = ModelConfig(**(SETTING_2 | {"r": r}))
    assert round(config.num_parameters() / 1e6, 2) == millions
    assert sum(p.numel() for p in on_meta(config).parameters()) == config.num_parameters()


def test_half_the_width_is_the_break_even_rank():
    vanilla, half = small(), small(r=32)
    assert half.num_parameters() == vanilla.num_parameters()
    assert half.flops_per_token(64) == vanilla.flops_per_token(64)


VARIANTS = {
    "vanilla": {},
    "lpa": {"r": 8},
    "each its rank": {"r": Ranks(q=2, k=4, v=6, o=10)},
    "q alone": {"r": Ranks(q=5)},
    "grouped": {"num_kv_heads": 2},
    "grouped lpa": {"num_kv_heads": 2, "r": 8},
    "wide heads": {"head_dim": 32, "r": 8},
    "ffn low": {"r": Ranks(ffn=24)},
    "all low": {"r": Ranks(q=8, k=8, v=8, o=8, ffn=24)},
    "tied": {"tie_embeddings": True},
    "head bias": {"lm_head_bias": True},
    "paper-1": {"family": "paper-1"},
    "paper-1 lpa": {"family": "paper-1", "r": 8},
    "paper-1 all low": {"family": "paper-1", "r": Ranks(q=8, k=8, v=8, o=8, ffn=24)},
    "paper-1 without head bias": {"family": "paper-1", "lm_head_bias": False},
    "qk norm": {"qk_norm": True, "num_kv_heads": 2},
    "latent norm": {"r": 8, "latent_norm": True},
    "latent norm, some dense": {"r": Ranks(q=2, v=6, ffn=24), "latent_norm": True},
    "latent norm without latents": {"latent_norm": True},
    "all aids": {"r": 8, "qk_norm": True, "latent_norm": True, "zero_init_outputs": True},
    "paper-1 norms": {"family": "paper-1", "r": 8, "qk_norm": True, "latent_norm": True},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_parameters_are_those_of_the_built_model(changes):
    config = small(**changes)
    assert sum(p.numel() for p in on_meta(config).parameters()) == config.num_parameters()


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({"qk_norm": True}, 3 * 2 * 16),
        ({"qk_norm": True, "num_kv_heads": 1, "head_dim": 20}, 3 * 2 * 20),
        ({"latent_norm": True}, 0),
        ({"latent_activation": "silu", "r": 8}, 0),
        ({"latent_norm": True, "r": 8}, 3 * 3 * 8),
        ({"latent_norm": True, "r": Ranks(q=2, o=5, ffn=24)}, 3 * (2 + 2 * 24)),
        ({"latent_norm": True, "r": Ranks(k=2, ffn=24), "family": "paper-1"}, 3 * (2 + 24)),
        ({"zero_init_outputs": True, "r": 8}, 0),
    ],
)
def test_parameters_and_flops_of_the_aids(changes, more):
    """Weights of head_dim for q and for k, or of r for each latent; norms are no matmul FLOPs."""
    off = {"qk_norm": False, "latent_norm": False, "zero_init_outputs": False}
    off |= {"latent_activation": "none"}
    with_them, without = small(**changes), small(**(changes | off))
    for embeddings in (True, False):
        count = with_them.num_parameters(embeddings) - without.num_parameters(embeddings)
        assert count == more
    assert with_them.flops_per_token(32) == without.flops_per_token(32)


# d 64, f 160, 3 layers, 4 heads of 16, vocabulary 1000, 32 tokens. Two FLOPs a multiply-add. Of the
# 32 keys a query sees 1, 2, ..., 32, on average 16.5: once for the scores and once for their sum.
ATTENTION = 2 * (4 * 16 * 16.5) + 2 * (4 * 16 * 16.5)
HEAD = 2 * 64 * 1000


@pytest.mark.parametrize(
    ("changes", "layer"),
    [
        ({}, 2 * (4 * 64 * 64 + 3 * 64 * 160)),
        ({"r": 8}, 2 * (4 * (8 * 64 + 64 * 8) + 3 * 64 * 160)),
        ({"num_kv_heads": 2}, 2 * (64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 160)),
        (
            {"num_kv_heads": 2, "r": 8},
            2 * ((8 * 64 + 64 * 8) + 2 * (8 * 64 + 32 * 8) + (8 * 64 + 64 * 8) + 3 * 64 * 160),
        ),
        ({"r": Ranks(ffn=24)}, 2 * (4 * 64 * 64 + 3 * (24 * 64 + 160 * 24))),
        ({"r": Ranks(q=8, o=4)}, 2 * (8 * 128 + 2 * 64 * 64 + 4 * 128 + 3 * 64 * 160)),
        ({"tie_embeddings": True}, 2 * (4 * 64 * 64 + 3 * 64 * 160)),
        ({"family": "paper-1"}, 2 * (4 * 64 * 64 + 2 * 64 * 160)),
        ({"family": "paper-1", "r": 8}, 2 * (4 * (8 * 64 + 64 * 8) + 2 * 64 * 160)),
    ],
)
def test_flops_are_those_counted_by_hand(changes, layer):
    assert small(**changes).flops_per_token(32) == 3 * (layer + ATTENTION) + HEAD


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("length", [1, 32])
def test_flops_are_those_of_torchs_counter(changes, length):
    """The counter sees what runs, and counts attention as if every query saw every key: each layer
    has T keys a query there, (T + 1) / 2 here.
    """
    config, batch = small(**changes), 2
    model = on_meta(config)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(batch, length, dtype=torch.long, device="meta"))
    assert config.head_dim is not None
    per_key = 3 * 4 * config.num_heads * config.head_dim
    full = config.flops_per_token(length) + per_key * (length - (length + 1) / 2)
    assert counter.get_total_flops() == batch * length * full


@pytest.mark.parametrize(
    ("shape", "r", "length", "millions"),
    [
        (SETTING_1, None, 1024, 719.8),
        (SETTING_1, 320, 1024, 644.3),
        (SETTING_2, None, 256, 223.7),
        (SETTING_2, 128, 256, 186.0),
    ],
)
def test_flops_of_the_papers_models(shape, r, length, millions):
    """Against a count that gives a query T / 2 keys, not (T + 1) / 2: the last digit may differ."""
    config = ModelConfig(**(shape | {"r": r}))
    assert config.flops_per_token(length) / 1e6 == pytest.approx(millions, abs=0.15)


def test_saving_of_low_dimensional_attention():
    """8d² - 16dr FLOPs a token and layer, whatever the sequence length."""
    for length in (1, 77):
        saved = small().flops_per_token(length) - small(r=8).flops_per_token(length)
        assert saved == 3 * (8 * 64 * 64 - 16 * 64 * 8)


@pytest.mark.parametrize(
    ("changes", "key", "found"),
    [
        ({"num_heads": 5}, "model.num_heads", "5"),
        ({"num_kv_heads": 3}, "model.num_kv_heads", "3"),
        ({"num_kv_heads": 8}, "model.num_kv_heads", "8"),
        ({"head_dim": 15}, "model.head_dim", "15"),
        ({"r": 65}, "model.r", "65"),
        ({"r": 33, "num_kv_heads": 2}, "k_proj", "33"),
        ({"r": Ranks(o=65)}, "o_proj", "65"),
        ({"r": Ranks(v=65)}, "v_proj", "65"),
        ({"r": Ranks(ffn=65)}, "gate_proj", "65"),
        ({"r": Ranks(ffn=65), "family": "paper-1"}, "up_proj", "65"),
        ({"r": 0}, "model.r", "0"),
        ({"r": -1}, "model.r", "-1"),
        ({"r": Ranks(k=0)}, "model.r.k", "0"),
        ({"r": Ranks(ffn=-3)}, "model.r.ffn", "-3"),
        ({"dropout": 1.0}, "model.dropout", "1.0"),
        ({"dropout": -0.1}, "model.dropout", "-0.1"),
        ({"tie_embeddings": True, "lm_head_bias": True}, "model.lm_head_bias", "tied"),
        ({"tie_embeddings": True, "family": "paper-1"}, "model.lm_head_bias", "tied"),
        ({"zero_init_outputs": True, "family": "paper-1"}, "model.zero_init_outputs", "paper-1"),
        ({"qk_norm": 1}, "model.qk_norm", "1"),
        ({"latent_norm": "yes"}, "model.latent_norm", "yes"),
        ({"zero_init_outputs": None}, "model.zero_init_outputs", "None"),
        ({"latent_activation": "relu", "r": 8}, "model.latent_activation", "'none', 'silu'"),
        ({"latent_activation": "silu", "latent_norm": True}, "model.latent_activation", "one of"),
        *[
            ({name: value}, f"model.{name}", str(value))
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_layers",
                "num_heads",
                "num_kv_heads",
                "head_dim",
                "max_seq_len",
                "rope_theta",
                "norm_eps",
                "init_std",
            )
            for value in (0, -2)
        ],
    ],
)
def test_refusals_name_the_key_and_what_was_found(changes, key, found):
    with pytest.raises(ValueError, match=re.escape(key)) as error:
        small(**changes)
    assert found in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rope_theta", "norm_eps", "init_std", "dropout"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_are_finite(name, value):
    """YAML and JSON both can write nan and inf."""
    with pytest.raises(ValueError, match=rf"model\.{name}"):
        small(**{name: value})


@pytest.mark.parametrize(
    ("changes", "key"), [({"family": "llama2"}, "model.family"), ({"init": "xavier"}, "model.init")]
)
def test_names_are_known_ones(changes, key):
    """A model.json does not pass the command line, which checks the names of a YAML."""
    with pytest.raises(ValueError, match=re.escape(key)):
        small(**changes)


@pytest.mark.parametrize("changes", [{"head_dim": 15, "family": "paper-1"}, {"r": 64}, {"r": 1}])
def test_limits_are_allowed(changes):
    small(**changes)


def test_defaults_are_resolved_by_family():
    llama, paper = small(), small(family="paper-1")
    assert (llama.head_dim, llama.num_kv_heads) == (16, 4)
    assert (llama.dropout, llama.lm_head_bias) == (0.0, False)
    assert (paper.dropout, paper.lm_head_bias) == (0.1, True)
    assert small(family="paper-1", dropout=0.0).dropout == 0.0


def test_an_integer_rank_is_that_of_attention_alone():
    assert small(r=8).ranks == Ranks(q=8, k=8, v=8, o=8, ffn=None)
    assert small().ranks == Ranks()


def test_each_rank_reaches_its_projection():
    config = small(r=Ranks(q=2, k=3, v=4, o=5, ffn=6), num_kv_heads=2)
    model = on_meta(config)
    attention, feed_forward = model.layers[2].attention, model.layers[2].feed_forward
    shapes = {
        name: (tuple(layer.A.shape), tuple(layer.B.shape))
        for module in (attention, feed_forward)
        for name, layer in module.named_children()
    }
    assert shapes == {
        "q_proj": ((2, 64), (64, 2)),
        "k_proj": ((3, 64), (32, 3)),
        "v_proj": ((4, 64), (32, 4)),
        "o_proj": ((5, 64), (64, 5)),
        "gate_proj": ((6, 64), (160, 6)),
        "up_proj": ((6, 64), (160, 6)),
        "down_proj": ((6, 160), (64, 6)),
    }


def test_dense_ranks_leave_dense_weights():
    model = on_meta(small(r=Ranks(k=3)))
    names = [n for n, _ in model.named_parameters() if n.startswith("layers.0.attention.")]
    assert sorted(n.removeprefix("layers.0.attention.") for n in names) == [
        "k_proj.A",
        "k_proj.B",
        "o_proj.weight",
        "q_proj.weight",
        "v_proj.weight",
    ]


def test_a_latent_norm_without_latents_is_named():
    for ranks in (None, Ranks(o=8)):
        assert small(latent_norm=True, r=ranks).warnings() == [
            "model.latent_norm has no effect: none of q, k, v and ffn is low-dimensional"
        ]
    for changes in ({}, {"r": 8}, {"latent_norm": True, "r": 8}, {"qk_norm": True}):
        assert small(**changes).warnings() == []
    assert small(latent_norm=True, r=Ranks(ffn=8)).warnings() == []


def test_a_latent_activation_without_latents_is_named():
    assert small(latent_activation="silu").warnings() == [
        "model.latent_activation has no effect: no projection is low-dimensional"
    ]
    for ranks in (8, Ranks(o=8), Ranks(ffn=8)):
        assert small(latent_activation="silu", r=ranks).warnings() == []


def test_a_model_json_from_before_the_aids(tmp_path: Path):
    path = write_json(
        tmp_path, r=8, qk_norm="absent", latent_norm="absent", zero_init_outputs="absent"
    )
    assert 'norm"' not in path.read_text()
    config = ModelConfig.from_json(path)
    assert [config.qk_norm, config.latent_norm, config.zero_init_outputs] == [False] * 3
    assert config == small(r=8)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_json_round_trip(changes, tmp_path: Path):
    config = small(**changes)
    config.to_json(tmp_path / "model.json")
    again = ModelConfig.from_json(tmp_path / "model.json")
    assert again == config
    assert type(again.r) is type(config.r)
    assert again.num_parameters() == config.num_parameters()


def write_json(folder: Path, **changes: Any) -> Path:
    path = folder / "model.json"
    fields = dataclasses.asdict(small()) | changes
    path.write_text(json.dumps({k: v for k, v in fields.items() if v != "absent"}))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_dim": 3}, "hidden_dim"),
        ({"hidden_size": "absent"}, "'hidden_size' is missing"),
        ({"vocab_size": "absent"}, "'vocab_size' is missing"),
        ({"r": {"q": 3, "fn": 4}}, "fn"),
        ({"r": {"q": 99}}, "model.r"),
        ({"num_layers": 0}, "model.num_layers"),
        ({"r": "8"}, "not a model description"),
    ],
)
def test_a_wrong_model_json_is_refused(changes, says, tmp_path):
    path = write_json(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        ModelConfig.from_json(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64.0},
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"num_layers": 2.5},
        {"r": 2.5},
        {"r": True},
        {"tie_embeddings": "no"},
    ],
)
def test_a_model_json_with_a_wrong_type_is_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=next(iter(changes))):
        ModelConfig.from_json(write_json(tmp_path, **changes))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"null", b"3", b"\xff\xfe", b""])
def test_what_is_no_model_json_is_refused(content, tmp_path):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        ModelConfig.from_json(path)

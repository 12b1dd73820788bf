"""Prefixes and soft prompts, against attention written out and against transformers' own ways."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import reference
from model import Transformer
from model.cache import KVCache
from model.configure import configure
from model.delta import (
    Delta,
    Deltas,
    LoraConfig,
    PrefixConfig,
    SoftPromptConfig,
    config_from_dict,
)
from model.delta.files import fingerprint, load_delta, save_delta
from model.delta.merge import merge
from model.execution import Execution
from tests.model.delta.backbones import FAMILIES, IDS, gpt2, llama, logits, ours, randomise

PREFIX = PrefixConfig(prefix_tokens=3, embed_dim=5, mid_dim=7)
OWN = PrefixConfig(prefix_tokens=3, reparameterize=False)
SOFT = SoftPromptConfig(soft_tokens=3)
CONFIGS = {"prefix": PREFIX, "own prefix": OWN, "soft prompt": SOFT}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_prefix = pytest.mark.parametrize("config", [PREFIX, OWN], ids=["network", "own"])
every_family = pytest.mark.parametrize(
    "changes", [*FAMILIES.values(), {"num_heads": 4, "num_kv_heads": 2}], ids=[*FAMILIES, "grouped"]
)


def tuned(model: nn.Module, *configs) -> Deltas:
    """Deltas named by number, with random values."""
    deltas = Deltas(model)
    for number, config in enumerate(configs):
        randomise(deltas.add(str(number), config), number, std=0.7)
    return deltas.double()


def grouped_llama() -> nn.Module:
    """A Llama whose keys and values have fewer heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=40, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


THEIRS = {"llama": llama, "grouped llama": grouped_llama, "gpt2": gpt2}
every_backbone = pytest.mark.parametrize("make", THEIRS.values(), ids=THEIRS)


def padding() -> Tensor:
    """A mask (3, 10) whose second row begins with padding."""
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    return mask


# --- prefixes ------------------------------------------------------------------------------------


def by_hand(model: nn.Module, prefix: Delta | None, ids: Tensor = IDS) -> Tensor:
    """Logits of a model of ours, its attention written out, with a prefix or none. ids (B, 10)."""
    x, rotary = model._embed(ids, torch.arange(10))
    start = model.config.document_start_id
    documents = (ids == (-1 if start is None else start)).cumsum(1)
    for index, block in enumerate(model.layers):

        def attend(h, at=block.attention, index=index):
            q, k, v = (
                part(h).unflatten(-1, (-1, at.head_dim))
                for part in (at.q_proj, at.k_proj, at.v_proj)
            )
            if rotary is not None:
                q, k = reference.apply_rotary(q, *rotary), reference.apply_rotary(k, *rotary)
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
            seen = torch.ones(10, 10, dtype=torch.bool).tril()
            seen = (seen & (documents[:, :, None] == documents[:, None]))[:, None]  # (B, 1, T, T)
            if prefix is not None:
                more = prefix.layer(f"layers.{index}.attention").prefix()
                k, v = (
                    torch.cat([p.expand(len(ids), *p.shape), own], dim=2)
                    for p, own in zip(more, (k, v), strict=True)
                )
                seen = F.pad(seen, (more[0].size(1), 0), value=True)
            k, v = (part.repeat_interleave(q.size(1) // k.size(1), dim=1) for part in (k, v))
            scores = (q @ k.mT / at.head_dim**0.5).masked_fill(~seen, -torch.inf)
            return at.o_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

        first = block.norm_first
        norm = block.attention_norm
        x = x + (attend(norm(x)) if first else norm(attend(x)))
        x = block._transform(x)
    return model.lm_head(model.final_norm(x))


@every_prefix
@every_family
def test_a_prefix_is_more_keys_and_values(changes, config):
    model = ours(**changes)
    before, keys = logits(model), list(model.state_dict())
    torch.testing.assert_close(before, by_hand(model, None).float())
    deltas = tuned(model, config)
    with_it = logits(model)
    assert list(model.state_dict()) == keys
    deltas.detach()
    assert torch.equal(logits(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.testing.assert_close(with_it, by_hand(model, deltas["0"]).float())
    assert not torch.allclose(with_it, before)
    deltas.attach()
    assert torch.equal(logits(model), with_it)


def test_the_network_of_a_prefix():
    """Li & Liang 2021, section 4.3: one embedding, one network, an output for each layer."""
    delta = tuned(ours(), PREFIX)["0"]
    layers = dict(delta.named_layers())
    first, second = layers["layers.0.attention"], layers["layers.1.attention"]
    assert first.embedding is second.embedding
    assert first.first is second.first
    assert delta.num_parameters() == 3 * 5 + (5 + 1) * 7 + 2 * (7 + 1) * 2 * 24
    hidden = torch.tanh(first.embedding @ first.first.weight.T + first.first.bias)
    both = hidden @ second.second.weight.T + second.second.bias  # (P, 2 · H · D)
    k, v = second.prefix()
    assert k.shape == (2, 3, 12)
    torch.testing.assert_close(k[1, 2], both[2, 12:24])
    torch.testing.assert_close(v[0, 1], both[1, 24:36])
    own = Deltas(ours()).add("a", OWN)
    assert own.num_parameters() == 2 * 2 * 3 * 24
    layer = own.layer("layers.1.attention")
    assert layer.prefix()[0] is layer.keys
    assert layer.prefix()[1] is layer.values


@every_prefix
@every_backbone
def test_a_prefix_is_a_filled_cache_of_transformers(make, config):
    from transformers import DynamicCache

    model = make()
    deltas = tuned(model, config)
    found, masked = logits(model), model(IDS, attention_mask=padding()).logits
    written = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    whole = logits(model, written)
    deltas.detach()

    def cache() -> DynamicCache:
        filled = DynamicCache(config=model.config)
        for index, (_, layer) in enumerate(deltas["0"].named_layers()):
            k, v = (part.detach().expand(3, *part.shape).clone() for part in layer.prefix())
            filled.update(k, v, index)
        return filled

    positions = torch.arange(10).expand(3, 10)  # else they would begin behind the prefix
    expected = model(IDS, past_key_values=cache(), position_ids=positions).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    both = torch.cat([torch.ones(3, 3, dtype=torch.long), padding()], dim=1)
    expected = model(
        IDS, past_key_values=cache(), position_ids=positions, attention_mask=both
    ).logits
    torch.testing.assert_close(masked, expected, rtol=1e-10, atol=1e-12)
    assert torch.equal(whole[:, 9:-1].argmax(-1), written[:, 10:])


def test_documents_all_see_the_prefix():
    model = ours(document_start_id=7)
    deltas = tuned(model, PREFIX)
    ids = torch.tensor([[7, 1, 2, 3, 7, 4, 5, 6, 8, 9], [1, 2, 7, 3, 7, 7, 5, 6, 8, 9]])
    torch.testing.assert_close(logits(model, ids), by_hand(model, deltas["0"], ids).float())
    other = ids.clone()
    other[0, 1] = 30
    changed = (logits(model, ids) != logits(model, other)).any(-1)
    assert changed.nonzero().tolist() == [[0, 1], [0, 2], [0, 3]]


def test_other_attention_is_refused_and_leaves_nothing_behind():
    model = ours(document_start_id=7)
    deltas = tuned(model, PREFIX)
    expected = logits(model)
    model.execution = Execution(attention="flex", kernels="reference", compile="off")
    for block in model.layers:
        block.attention.backend = "flex"
    message = r"layers\.0\.attention: it did not call .*prefix 0 acts.*flex, flash_attn or eager"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        logits(model)
    assert not torch.overrides._get_current_function_mode_stack()
    deltas.activate()
    with torch.no_grad():
        logits(model)
    theirs = llama()
    theirs.set_attn_implementation("eager")
    tuned(theirs, PREFIX)
    with pytest.raises(ValueError, match="did not call torch's scaled_dot_product_attention"):
        logits(theirs)
    deltas.activate("0")
    configure(model, Execution(), torch.device("cpu"), torch.float64)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize(
    ("targets", "more", "message"),
    [
        (["feed_forward"], {}, "FeedForward, whose heads of keys and values cannot be read"),
        (
            ["attention"],
            {"head_dim": 8, "num_kv_heads": 2},
            r"keys or values are \(3, 2, 10, 12\), .* 2 heads, 8 wide",
        ),
        (["attention"], {"num_kv_heads": 4}, "prefix has 4 heads, 12 wide; give num_kv_heads"),
    ],
)
def test_heads_that_do_not_fit(targets, more, message):
    model = ours()
    config = PrefixConfig(targets=targets, reparameterize=False, **more)

    def use() -> None:
        Deltas(model).add("a", config)
        logits(model)

    with pytest.raises(ValueError, match=message):
        use()
    assert not torch.overrides._get_current_function_mode_stack()


EXECUTIONS = {
    "fused": {"kernels": "triton"},
    "recompute blocks": {"recompute_blocks": True},
    "recompute parts": {"recompute_qkv": True, "recompute_ffn": True},
    "math": {"attention": "math"},
    "compiled": {"compile": "on"},
}
MARKED = [
    pytest.param(value, id=name, marks=[pytest.mark.slow] if name == "compiled" else [])
    for name, value in EXECUTIONS.items()
]


@every_config
@pytest.mark.parametrize("execution", MARKED)
def test_execution_changes_nothing(config, execution):
    model = ours(r=6)
    deltas = tuned(model, config)
    deltas.freeze_backbone()

    def both() -> tuple[Tensor, list[Tensor]]:
        deltas.zero_grad()
        found = logits(model)
        found.square().mean().backward()
        return found.detach(), [p.grad.clone() for p in deltas.parameters()]

    expected, wanted = both()
    configure(model, Execution(**execution), torch.device("cpu"), torch.float64)
    found, gradients = both()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # logits are float32
    for gradient, one in zip(gradients, wanted, strict=True):
        assert one.any()
        torch.testing.assert_close(gradient, one, rtol=1e-6, atol=1e-9)
    assert not torch.overrides._get_current_function_mode_stack()


# --- soft prompts --------------------------------------------------------------------------------


@every_backbone
def test_a_soft_prompt_is_in_inputs_embeds_of_transformers(make):
    model = make()
    before = logits(model)
    deltas = tuned(model, SOFT)
    found = model(IDS, labels=IDS, attention_mask=padding())
    bare, positions = logits(model), torch.arange(10).expand(3, 10)
    torch.testing.assert_close(model(input_ids=IDS, position_ids=positions).logits, bare)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = model.generate(IDS, attention_mask=padding(), **greedy)
    as_tuple = model(IDS, return_dict=False)[0]
    deltas.detach()
    assert torch.equal(logits(model), before)
    prompt = deltas["0"].layer(next(deltas["0"].named_layers())[0]).prompt
    embedded = torch.cat([prompt.expand(3, -1, -1), model.get_input_embeddings()(IDS)], dim=1)
    torch.testing.assert_close(bare, model(inputs_embeds=embedded).logits[:, 3:])
    torch.testing.assert_close(as_tuple, bare)
    expected = model(
        inputs_embeds=embedded,
        labels=F.pad(IDS, (3, 0), value=-100),
        attention_mask=F.pad(padding(), (3, 0), value=1),
    )
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits[:, 3:])
    mask = F.pad(padding(), (3, 0), value=1)
    wanted = model.generate(inputs_embeds=embedded, attention_mask=mask, **greedy)
    assert torch.equal(written[:, 10:], wanted)


@every_family
def test_a_soft_prompt_of_ours(changes):
    """Against the model on ids of new tokens, which stand for the prompt in a longer vocabulary."""
    model = ours(**changes)
    before, keys = logits(model), list(model.state_dict())
    targets = torch.where(IDS > 30, -100, IDS)
    deltas = tuned(model, SOFT)
    found, losses = logits(model), model(IDS, targets, reduction="none")
    mean = model(input_ids=IDS, targets=targets)
    assert list(model.state_dict()) == keys
    deltas.detach()
    assert torch.equal(logits(model), before)
    prompt = deltas["0"].layer("token_embedding").prompt
    table = model.token_embedding.weight
    model.token_embedding.weight = nn.Parameter(torch.cat([table, prompt]))
    longer = torch.cat([torch.arange(40, 43).expand(3, 3), IDS], dim=1)
    expected = logits(model, longer)[:, 3:]
    torch.testing.assert_close(found, expected)
    wanted = F.cross_entropy(
        expected.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
    )
    torch.testing.assert_close(losses, wanted.view(3, 10))
    torch.testing.assert_close(mean, wanted.sum() / (targets != -100).sum())


def test_starts_of_a_soft_prompt():
    model = ours()
    table = model.token_embedding.weight
    torch.manual_seed(0)
    prompt = Deltas(model).add("a", SOFT).layer("token_embedding").prompt
    assert all((row.double() - table).abs().amax(1).min() < 1e-7 for row in prompt)
    wide = SoftPromptConfig(soft_tokens=31, init="normal", init_std=0.5)
    prompt = Deltas(model).add("a", wide).layer("token_embedding").prompt
    assert prompt.std().item() == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("make", [ours, llama], ids=["ours", "llama"])
def test_a_soft_prompt_needs_place(make):
    model = make()
    deltas = tuned(model, SoftPromptConfig(soft_tokens=23))
    with pytest.raises(ValueError, match="23 soft tokens and 10 of the input are more than the 32"):
        logits(model)
    assert logits(model, IDS[:, :9]).shape == (3, 9, 40)
    with pytest.raises(ValueError, match="soft_tokens: 32; allowed is 1 to 31"):
        deltas.add("b", SoftPromptConfig(soft_tokens=32))


def test_what_cannot_have_a_soft_prompt():
    model = llama()
    deltas = Deltas(model)
    with pytest.raises(ValueError, match=r"allowed is one nn\.Embedding"):
        deltas.add("a", SoftPromptConfig(targets=["q_proj"]))
    with pytest.raises(ValueError, match="within documents"):
        Deltas(ours(document_start_id=7)).add("a", SOFT)
    deltas.add("a", SOFT)
    deltas.double()
    with pytest.raises(ValueError, match=r"needs input_ids \(B, T\)"):
        model(inputs_embeds=torch.zeros(1, 2, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="outside of the backbone's forward"):
        model.model(IDS)
    with pytest.raises(ValueError, match=r"attention_mask \(3, 1, 10, 10\)"):
        model(IDS, attention_mask=torch.ones(3, 1, 10, 10))
    with pytest.raises(ValueError, match="outside of the backbone's forward"):
        model.model(IDS)  # after an error in between, and after a pass
    assert logits(model).shape == (3, 10, 40)
    with pytest.raises(ValueError, match="outside of the backbone's forward"):
        model.model(IDS)


def test_rows_with_soft_prompts_of_their_own():
    model = ours(r=6)
    deltas = tuned(model, SOFT, SOFT, SoftPromptConfig(soft_tokens=2))
    alone = {}
    for name in "012":
        deltas.activate(name)
        alone[name] = logits(model)
    with deltas.rows(["1", "0", "1"]):
        mixed = logits(model)
    for row, name in enumerate("101"):
        torch.testing.assert_close(mixed[row], alone[name][row])
    with (
        deltas.rows(["0", None, "1"]),
        pytest.raises(ValueError, match="of 3 rows 2 have a prompt"),
    ):
        logits(model)
    with (
        deltas.rows(["0", "2", "1"]),
        pytest.raises(ValueError, match="3 rows 3 have a prompt, of 3, 2, 3"),
    ):
        logits(model)
    deltas.activate("2", "0")
    both = logits(model)
    one = tuned(ours(r=6), SoftPromptConfig(soft_tokens=5))
    prompts = [deltas[name].layer("token_embedding").prompt for name in "20"]
    one["0"].layer("token_embedding").prompt = nn.Parameter(torch.cat(prompts))
    torch.testing.assert_close(both, logits(one.backbone))


# --- what both have in common --------------------------------------------------------------------


@every_prefix
@pytest.mark.parametrize("masked", [False, True])
def test_rows_with_prefixes_of_their_own(config, masked):
    model = ours(r=6, document_start_id=7 if masked else None)
    deltas = tuned(model, config, PrefixConfig(prefix_tokens=5, reparameterize=False), LoraConfig())
    alone = {}
    for name in ("0", "1", "2", None):
        deltas.activate(*([name] if name else []))
        alone[name] = logits(model)
    for rows in (["1", None, "0"], ["2", "0", "1"], [None, "1", None]):
        with deltas.rows(rows):
            mixed = logits(model)
        for row, name in enumerate(rows):
            torch.testing.assert_close(mixed[row], alone[name][row])
    for wrong, message in ((["0"], "was given 1"), (["1"] * 4, "was given more")):
        with deltas.rows(wrong), pytest.raises(ValueError, match=message):
            logits(model)


def test_several_prefixes_are_one_of_all_their_tokens():
    model = ours(num_heads=4, num_kv_heads=2)
    deltas = tuned(model, OWN, PrefixConfig(prefix_tokens=2, reparameterize=False))
    both = logits(model)
    other = ours(num_heads=4, num_kv_heads=2)
    one = tuned(other, PrefixConfig(prefix_tokens=5, reparameterize=False))
    for path, layer in one["0"].named_layers():
        for leaf in ("keys", "values"):
            parts = [getattr(deltas[name].layer(path), leaf) for name in "01"]
            setattr(layer, leaf, nn.Parameter(torch.cat(parts, dim=1)))
    torch.testing.assert_close(both, logits(other))


@every_config
def test_decoding_with_a_cache(config):
    model = ours(r=6, num_kv_heads=1)
    deltas = tuned(model, config, LoraConfig(r=3))
    expected = logits(model)
    cache = KVCache(model.config, 3, 20, torch.device("cpu"), torch.float64)
    pieces = [model(part, cache=cache) for part in IDS.split([4, 1, 3, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected)
    with deltas.detached(), pytest.raises(AssertionError):
        torch.testing.assert_close(logits(model), expected)


@every_config
def test_freezing_checkpointing_and_tuning(config):
    model = ours(r=6)
    deltas = Deltas(model)
    deltas.add("a", config)
    deltas.double()
    deltas.freeze_backbone()
    logits(model).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    wanted = [p.grad.clone() for p in deltas.parameters()]
    assert all(gradient.any() for gradient in wanted)
    deltas.zero_grad()
    checkpoint(model, IDS, use_reentrant=False).square().sum().backward()
    for parameter, gradient in zip(deltas.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    optimizer = torch.optim.AdamW(deltas.parameters(), lr=0.03)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(model(IDS, IDS))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1


@every_config
def test_files_merging_and_dictionaries(tmp_path: Path, config):
    model = ours(torch.float32, r=6)
    deltas = Deltas(model)
    randomise(deltas.add("a", config))
    expected = logits(model)
    save_delta(deltas["a"], tmp_path / "a", fingerprint(model))
    with pytest.raises(ValueError, match="adds no low-rank matrix to a weight"):
        merge(deltas, "a")
    fresh = ours(torch.float32, r=6)
    found = load_delta(tmp_path / "a", fresh).delta
    Deltas(fresh).insert("b", found)
    assert torch.equal(logits(fresh), expected)
    assert found.num_parameters() == deltas["a"].num_parameters()
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@every_config
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_backbones(config, autocast):
    model = ours(torch.float32 if autocast else torch.bfloat16, r=6)
    deltas = Deltas(model)
    randomise(deltas.add("a", config), std=0.1)
    exact = ours(r=6)
    exact.load_state_dict(model.state_dict())
    other = Deltas(exact)
    other.add("a", config)
    other.load_state_dict(deltas.state_dict())
    other.double()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        found = logits(model)
    assert (found.double() - logits(exact)).norm() / logits(exact).norm() < 0.03


@every_config
@pytest.mark.slow
def test_torch_compile_of_the_whole(config):
    """Of ours with a prefix not in one graph: Dynamo cannot trace Tensor.unflatten in a mode. The
    backend "eager" would apply the prefix twice then: its graphs call torch functions, which the
    mode sees again.
    """
    for model in (llama(), ours(r=6)):
        deltas = tuned(model, config)
        whole = config is SOFT or not isinstance(model, Transformer)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=whole)
        for names in (("0",), ()):
            deltas.activate(*names)
            torch.testing.assert_close(logits(compiled), logits(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefixConfig(prefix_tokens=0), "prefix_tokens: 0"),
        (lambda: PrefixConfig(mid_dim=0), "mid_dim: 0"),
        (lambda: PrefixConfig(init_std=-1.0), "init_std: -1.0"),
        (lambda: PrefixConfig(head_dim=0), "head_dim: 0"),
        (lambda: SoftPromptConfig(soft_tokens=0), "soft_tokens: 0"),
        (lambda: SoftPromptConfig(init_std=-1.0), "init_std: -1.0"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()

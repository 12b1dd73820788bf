"""LpaForCausalLM as a model of transformers: cache, padding, generation, loss, saving, training."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from data.tokenizer import Tokenizer
from eval.generate import GenerateConfig, generate
from model import Transformer
from model.export import register
from model.export.__main__ import ExportConfig, export
from model.export.factorised import lpa_fields, lpa_weights
from model.export.hugging_face.configuration_lpa import LpaConfig
from model.export.hugging_face.modeling_lpa import LpaForCausalLM
from tests.model.export.checkpoints import SHAPE, bound, random_model, write_checkpoint

MODELS: list[dict[str, Any]] = [
    {"num_kv_heads": 2, "qk_norm": True, "latent_norm": True},
    {"family": "paper-1"},
    {"document_start_id": 1, "r": {"q": 4, "ffn": 6}},
]
each_model = pytest.mark.parametrize("options", MODELS)


def converted(model: Transformer) -> LpaForCausalLM:
    """Our model in transformers, in this process. A tied head is not among the weights."""
    theirs = LpaForCausalLM(LpaConfig(**lpa_fields(model.config)))
    strict = not model.config.tie_embeddings
    theirs.load_state_dict(lpa_weights(model, torch.float32), strict=strict)
    return theirs.eval()


def some_ids(rows: int = 2, length: int = 20) -> torch.Tensor:
    ids = torch.randint(2, SHAPE["vocab_size"], (rows, length))
    ids[:, 0] = 1
    ids[0, 11] = ids[1:, 5] = 1  # a new document
    return ids


@each_model
@torch.no_grad()
def test_a_cache_changes_nothing(options: dict[str, Any]):
    model = random_model(**options)
    theirs, ids = converted(model), some_ids()
    whole = model(ids)
    for cuts in ([9, 1, 1, 9], [1] * 20):
        cache = DynamicCache(config=theirs.config)
        pieces = [theirs(part, past_key_values=cache).logits for part in ids.split(cuts, dim=1)]
        torch.testing.assert_close(
            torch.cat(pieces, dim=1), whole, rtol=0, atol=bound(model, whole)
        )
        assert cache.get_seq_length() == 20


@pytest.mark.parametrize("options", MODELS[:2])
@torch.no_grad()
def test_a_cache_of_fixed_size_changes_nothing(options: dict[str, Any]):
    model = random_model(**options)
    theirs, ids = converted(model), some_ids()
    whole = model(ids)
    cache = StaticCache(config=theirs.config, max_cache_len=32)
    pieces = [theirs(part, past_key_values=cache).logits for part in ids.split([12, 8], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=0, atol=bound(model, whole))


@each_model
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_at_the_left_changes_nothing(options: dict[str, Any], attention: str):
    model = random_model(**options)
    theirs = converted(model)
    theirs.set_attn_implementation(attention)
    ids = some_ids(1, 14)
    alone = model(ids)
    padded = torch.cat([torch.full((1, 6), 2), ids], dim=1)
    both = torch.cat([padded, some_ids(1, 20)])
    mask = torch.ones_like(both)
    mask[0, :6] = 0
    found = theirs(both, attention_mask=mask).logits
    tolerance = bound(model, alone)
    torch.testing.assert_close(found[:1, 6:], alone, rtol=0, atol=tolerance)
    cache = DynamicCache(config=theirs.config)
    theirs(both[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
    rest = theirs(both[:, 10:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(rest, found[:, 10:], rtol=0, atol=tolerance)


@each_model
def test_eager_and_sdpa_are_one_model(options: dict[str, Any]):
    model = random_model(**options)
    theirs, ids = converted(model), some_ids()
    logits, gradients = {}, {}
    for attention in ("eager", "sdpa"):
        theirs.set_attn_implementation(attention)
        theirs.zero_grad()
        found = theirs(ids, labels=ids)
        found.loss.backward()
        logits[attention] = found.logits
        gradients[attention] = torch.cat([p.grad.flatten() for p in theirs.parameters()])
    tolerance = bound(model, logits["sdpa"])
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=0, atol=tolerance)
    tolerance = bound(model, gradients["sdpa"])
    torch.testing.assert_close(gradients["eager"], gradients["sdpa"], rtol=0, atol=tolerance)


@torch.no_grad()
def test_attentions_and_hidden_states_come_on_request():
    theirs, ids = converted(random_model()), some_ids()
    theirs.set_attn_implementation("eager")
    found = theirs(ids, output_attentions=True, output_hidden_states=True)
    assert [tuple(one.shape) for one in found.attentions] == [(2, 4, 20, 20)] * 2
    torch.testing.assert_close(found.attentions[0].sum(-1), torch.ones(2, 4, 20))
    assert len(found.hidden_states) == 3
    torch.testing.assert_close(theirs.lm_head(found.hidden_states[-1]), found.logits)


@each_model
def test_the_loss_is_ours_and_ignores_minus_100(options: dict[str, Any]):
    model, ids = random_model(**options), some_ids()
    labels = ids.clone()
    labels[0, :6] = -100
    with torch.no_grad():
        logits = model(ids)[:, :-1].double()
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    with torch.no_grad():
        found = converted(model)(ids, labels=labels).loss
    # A mean of differences of logits: off by no more than two of them.
    assert float(found) == pytest.approx(float(expected), abs=2 * bound(model, logits))


@each_model
@torch.no_grad()
def test_greedy_generation_is_that_of_eval_generate(
    options: dict[str, Any], tokenizer_file: Path, tokenizer: Tokenizer, tmp_path: Path
):
    """Also where the likeliest id is one that the tokenizer does not have."""
    model = random_model(**options)
    model.lm_head.weight[tokenizer.vocab_size :] *= 3
    source = write_checkpoint(model, tokenizer_file, tmp_path / "checkpoint")
    export(ExportConfig(str(source), "hf", str(tmp_path / "out")))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    padded = 0
    for seed in range(4):
        torch.manual_seed(seed)
        ids = some_ids(2, 12)[:1]
        settings = GenerateConfig("", max_new_tokens=20, temperature=0)
        ours = list(generate(model, ids[0].tolist(), settings, 0, tokenizer.vocab_size))
        ends = [at for at, token in enumerate(ours) if token in (1, 2)]
        ours = ours[: ends[0] + 1] if ends else ours
        found = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False
        )
        assert found[0, 12:].tolist() == ours
        padded += int(model(ids)[0, -1].argmax()) >= tokenizer.vocab_size
    assert padded, "no likeliest id was a padded one: the test shows nothing of them"


@torch.no_grad()
def test_a_text_ends_where_the_next_document_begins(
    tokenizer_file: Path, tokenizer: Tokenizer, tmp_path: Path
):
    model, ids = random_model(), some_ids(1, 12)
    settings = GenerateConfig("", max_new_tokens=9, temperature=0)
    before = list(generate(model, ids[0].tolist(), settings, 0, tokenizer.vocab_size))
    new = [at for at in range(1, 9) if before[at] not in (1, 2, *before[:at])]
    at, token = new[0], before[new[0]]
    assert not {1, 2} & {*before[:at]}
    swapped = model.lm_head.weight[[1, token]]
    model.lm_head.weight[[token, 1]] = swapped  # so that BOS comes in the place of the token
    source = write_checkpoint(model, tokenizer_file, tmp_path / "checkpoint")
    for form in ("hf", "llama"):
        export(ExportConfig(str(source), form, str(tmp_path / form)))  # type: ignore[arg-type]
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / form)
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        found = theirs.generate(ids, max_new_tokens=9, **options)
        assert found[0, 12:].tolist() == [*before[:at], 1]


@torch.no_grad()
def test_documents_follow_the_beams():
    """Beam search reorders the cache; without a cache there is nothing to reorder."""
    theirs = converted(random_model(document_start_id=1))
    ids, options = some_ids(), {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    mask = torch.ones_like(ids)
    options |= {"attention_mask": mask, "pad_token_id": 2}
    cached = theirs.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, theirs.generate(ids, use_cache=False, **options))


def test_documents_need_ids_and_a_cache_that_grows():
    theirs = converted(random_model(document_start_id=1))
    with pytest.raises(ValueError, match="needs input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 3, 32))
    cache = StaticCache(config=theirs.config, max_cache_len=8)
    with pytest.raises(ValueError, match="takes a DynamicCache"):
        theirs(some_ids(), past_key_values=cache)


@pytest.mark.parametrize("options", [*MODELS, {"tie_embeddings": True}])
@torch.no_grad()
def test_saving_and_loading_keeps_every_bit(options: dict[str, Any], tmp_path: Path):
    register()
    theirs, ids = converted(random_model(**options)), some_ids()
    theirs.save_pretrained(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True
    )
    assert not any(info.values())
    beside = {"dtype": 0, "_name_or_path": ""}
    assert loaded.config.to_dict() | beside == theirs.config.to_dict() | beside
    for name, value in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
    assert (tmp_path / "saved" / "modeling_lpa.py").exists()


def test_a_weight_that_is_missing_is_reported(tmp_path: Path):
    register()
    converted(random_model()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.0.attention.q_proj.A.weight"
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {gone}


@pytest.mark.parametrize("options", [{"latent_norm": True}, {"family": "paper-1", "dropout": 0.2}])
def test_checkpointing_changes_no_gradient(options: dict[str, Any]):
    model, ids = random_model(**options), some_ids()
    gradients = []
    for checkpointing in (False, True):
        theirs = converted(model).train()
        if checkpointing:
            theirs.gradient_checkpointing_enable()
        calls = []
        theirs.model.layers[0].attention.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        torch.manual_seed(3)  # of dropout
        theirs(ids, labels=ids).loss.backward()
        assert len(calls) == (2 if checkpointing else 1), "recomputed once"
        gradients.append([p.grad for p in theirs.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)


def test_new_weights_have_the_variance_of_dense_ones():
    torch.manual_seed(0)
    fields = lpa_fields(random_model(hidden_size=128, intermediate_size=256, r=64).config)
    model = LpaForCausalLM(LpaConfig(**fields | {"ranks": {"q": 64, "o": 64}}))
    attention = model.model.layers[0].attention
    for layer, std in ((attention.q_proj, 0.02), (attention.o_proj, 0.02 / 2)):  # √(2L) = 2
        product = (layer.B.weight @ layer.A.weight).detach()
        # 128² entries of rank 64: about 64 · 128 that are independent.
        assert float(product.std()) == pytest.approx(std, rel=4 / (2 * 64 * 128) ** 0.5)
    dense = attention.k_proj.weight.detach()
    assert float(dense.std()) == pytest.approx(0.02, rel=4 / (2 * 128**2) ** 0.5)
    assert bool((model.model.norm.weight == 1).all())


def test_peft_attaches_to_factors_and_dense_weights():
    model = converted(random_model(r={"q": 8, "v": 8}))
    ids = some_ids()
    with torch.no_grad():
        before = model(ids).logits
    targets = ["q_proj.A", "v_proj.B", "k_proj", "down_proj"]
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        assert torch.equal(tuned(ids).logits, before)
    adapted = {name for name, module in tuned.named_modules() if hasattr(module, "lora_A")}
    assert {name.split("layers.")[1] for name in adapted} == {
        f"{layer}.{path}"
        for layer in (0, 1)
        for path in (
            "attention.q_proj.A", "attention.v_proj.B", "attention.k_proj", "feed_forward.down_proj"
        )
    }  # fmt: skip
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        loss = tuned(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = tuned.eval()(ids).logits
        assert float((after - before).abs().max()) > 0.01
        merged = tuned.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, after, rtol=0, atol=1e-4 * float(after.abs().max()))


def test_peft_does_not_take_a_factorised_projection_whole():
    model = converted(random_model())
    with pytest.raises(ValueError, match="not supported"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))

"""The three forms of the cache: each exact, as small as it says, and rows of unequal length."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from model import ModelConfig, Transformer
from model.cache import KVCache, cached_numbers
from model.config import Ranks
from model.delta import Deltas, LoraConfig
from tests.model.test_transformer import LONGEST, build, logits64, one_thread, tokens

__all__ = ["one_thread"]  # the fixture

CPU = torch.device("cpu")
# Sums of 32 to 56 terms of size one in three layers: 1e-16 · 1e3, and two digits to spare.
EXACT = {"rtol": 0.0, "atol": 1e-11}
MODELS: dict[str, dict[str, Any]] = {
    "lpa": {"r": 5},
    "rank over head": {"r": 20},
    "rank over head, grouped": {"r": 15, "num_kv_heads": 2},
    "each its rank": {"r": Ranks(q=None, k=9, v=4, o=None)},
    "grouped": {"r": 5, "num_kv_heads": 2, "head_dim": 12},
    "qk norm": {"r": 5, "qk_norm": True, "num_kv_heads": 2},
    "latent norm": {"r": 5, "latent_norm": True},
    "silu": {"r": 5, "latent_activation": "silu"},
    "paper-1": {"r": 5, "family": "paper-1"},
    "documents": {"r": 5, "document_start_id": 7},
}
FORMS = ("full", "value_latent", "latent")
each_model = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
each_form = pytest.mark.parametrize("form", FORMS)


def cache_of(model: Transformer, batch: int, form: Any, **options: Any) -> KVCache:
    """A cache whose memory is NaN before it is written, so that reading it shows."""
    cache = KVCache(model.config, batch, LONGEST, CPU, torch.float64, form, **options)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


@each_form
@each_model
@torch.no_grad()
def test_every_form_gives_the_logits_of_the_forward(changes, form):
    """Prefill, a chunk behind it, single tokens; chunks long and short, so that values are both
    rebuilt and summed as latents.
    """
    model, ids = build(**changes), tokens(2, LONGEST)
    whole = logits64(model, ids)
    for chunks in [(20, 9, 1, 1, 17), (1,) * LONGEST]:
        cache = cache_of(model, 2, form)
        parts = [logits64(model, chunk, cache) for chunk in ids.split(chunks, dim=1)]
        assert_close(torch.cat(parts, dim=1), whole, **EXACT)


@torch.no_grad()
def test_values_are_rebuilt_for_long_chunks_alone(monkeypatch):
    """r 20, heads of 8: summing latents costs T · 4 · 12 more, rebuilding 20 · 4 · 8: from T 14."""
    import model.attention as module

    lengths: list[int] = []
    inner = module.attend_latents

    def spy(q: Tensor, *rest: Any) -> Tensor:
        lengths.append(q.size(1))
        return inner(q, *rest)

    monkeypatch.setattr(module, "attend_latents", spy)
    network = build(r=20)
    for length in (1, 13, 14):
        network(tokens(1, length), cache=cache_of(network, 1, "value_latent"))
    assert lengths == [1] * 3 + [13] * 3  # three layers each


def left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    padding = torch.tensor([longest - len(row) for row in rows])
    # Padding of the token that begins documents: it must mean nothing.
    padded = [torch.cat([torch.full((longest - len(row),), 7), row]) for row in rows]
    return torch.stack(padded), padding


@each_form
@each_model
@torch.no_grad()
def test_rows_of_unequal_length_compute_what_they_do_alone(changes, form):
    model = build(**changes)
    rows = [tokens(1, length, seed=length)[0] for length in (3, 20, 11)]
    ids, padding = left_padded(rows)
    cache, more = cache_of(model, 3, form, padding=padding), tokens(3, 6, seed=9)
    # The prompts in two chunks, of which the first is padding alone for one row; then tokens.
    chunks = (ids[:, :10], ids[:, 10:], *more[:, :4].split(1, dim=1), more[:, 4:])
    found = torch.cat([logits64(model, chunk, cache) for chunk in chunks], dim=1)
    for index, row in enumerate(rows):
        whole = logits64(model, torch.cat([row, more[index]])[None])[0]
        assert_close(found[index, int(padding[index]) :], whole, **EXACT)


@each_form
@torch.no_grad()
def test_rows_that_are_kept_go_on_as_before(form):
    model = build(r=5, document_start_id=7)
    ids, padding = left_padded([tokens(1, n, seed=n)[0] for n in (9, 5, 7)])
    more = tokens(3, 3, seed=1)
    every, some = (cache_of(model, 3, form, padding=padding) for _ in range(2))
    for cache in (every, some):
        model(ids, cache=cache)
    rows = torch.tensor([2, 1])
    some.keep(rows)
    assert some.least_padding == 2
    assert_close(logits64(model, more[rows], some), logits64(model, more, every)[rows], **EXACT)


def test_rows_end_where_their_own_tokens_do():
    """The longest row fills max_seq_len; without it the others may go on."""
    model = build(r=5)
    ids, padding = left_padded([tokens(1, LONGEST)[0], tokens(1, 10)[0]])
    cache = KVCache(model.config, 2, LONGEST + 5, CPU, torch.float64, padding=padding)
    model(ids, cache=cache)
    with pytest.raises(ValueError, match=rf"{LONGEST + 1} .*model\.max_seq_len"):
        model(tokens(2, 1), cache=cache)
    cache.keep(torch.tensor([1]))
    model(tokens(1, 5), cache=cache)
    assert cache.length == LONGEST + 5


@pytest.mark.parametrize(
    ("d", "heads", "r", "form", "share"),
    [
        (768, 12, 128, "latent", 0.83),  # 130M
        (1024, 16, 320, "latent", 0.69),
        (768, 12, 128, "value_latent", 0.42),
    ],
)
def test_share_of_the_cache_that_latents_save(d, heads, r, form, share):
    """By hand: 1 - 2r / 2d for both, 1 - (d + r) / 2d for values alone."""
    config = ModelConfig(32000, d, 4 * d, 2, heads, r=r)
    saved = 1 - cached_numbers(config, form) / cached_numbers(config, "full")
    assert saved == pytest.approx(1 - (r / d if form == "latent" else (d + r) / (2 * d)))
    assert round(saved, 2) == share


@each_form
def test_memory_is_what_is_counted(form):
    model = build(r=Ranks(k=9, v=4), num_kv_heads=2)
    cache = KVCache(model.config, 3, 40, CPU, torch.float64, form)
    assert cache.nbytes == 3 * 40 * 8 * cached_numbers(model.config, form)
    assert (
        cached_numbers(model.config, form)
        == 3 * {"full": 32, "value_latent": 20, "latent": 13}[form]
    )


@pytest.mark.parametrize(
    ("ranks", "form", "allowed"),
    [
        (None, "value_latent", "v_proj.*allowed is full$"),
        (Ranks(v=4), "latent", "k_proj.*allowed is full, value_latent$"),
        (Ranks(k=4), "latent", "v_proj.*allowed is full$"),
    ],
)
def test_a_form_without_its_latents_is_refused(ranks, form, allowed):
    with pytest.raises(ValueError, match=rf"cache: {form} .*{allowed}"):
        KVCache(build(r=ranks).config, 1, 8, CPU, torch.float64, form)


def test_latents_under_a_delta_are_refused():
    """A delta adds to the output of v_proj, which the latent does not hold."""
    model = build(r=5)
    deltas = Deltas(model)
    deltas.add("a", LoraConfig(targets=["v_proj"], r=2))
    with pytest.raises(ValueError, match=r"v_proj.*merge the delta"):
        model(tokens(1, 3), cache=cache_of(model, 1, "value_latent"))
    model(tokens(1, 3), cache=cache_of(model, 1, "full"))


def test_padding_needs_a_backend_with_masks():
    model = build(r=5)
    model.execution = type(model.execution)(kernels="reference", compile="off", attention="flash")
    with pytest.raises(ValueError, match="flash takes no mask"):
        model(tokens(2, 3), cache=cache_of(model, 2, "full", padding=torch.tensor([0, 1])))

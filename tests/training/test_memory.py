"""The memory formulas against what a forward pass really keeps."""

import pytest
import torch

from kernels.reference import rotary_table
from model import ModelConfig, Transformer, init_weights
from model.config import Ranks
from model.configure import configure
from model.execution import Execution
from tests.model.measure import kept_bytes
from training import memory

SHAPE = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 336, "num_layers": 2}
REBUILD = {"recompute_qkv": True}, {"recompute_ffn": True}, {"recompute_blocks": True}


def saved_bytes(config: ModelConfig, execution: Execution, batch: int, length: int) -> int:
    """Bytes that a forward pass to the logits really keeps for the backward pass, in float32 on the
    CPU, without the logits and the rotary table (nobody else's formula has them).
    """
    model = Transformer(config)
    init_weights(model, 0)
    configure(model, execution, torch.device("cpu"), torch.float32)
    table = 2 * length * config.head_dim // 2 * 4 if config.family == "llama" else 0
    ids = torch.zeros(batch, length, dtype=torch.long)
    return kept_bytes(lambda: model(ids)) - table


SHAPES = [
    {},
    {"r": 16},
    {"r": 96},
    {"num_layers": 5},
    {"intermediate_size": 1024},
    {"num_kv_heads": 1},
    {"document_start_id": 1},
    {"r": Ranks(q=16, k=32, v=48, o=64, ffn=96)},
    {"r": 16, "latent_norm": True},
    {"r": Ranks(q=96, k=64, v=48, o=96, ffn=96), "latent_norm": True},
]
PAPER = {"family": "paper-1", "dropout": 0.0}
UNFUSED = [
    PAPER,
    PAPER | {"r": 32},
    PAPER | {"r": 32, "qk_norm": True, "latent_norm": True},
    {"qk_norm": True},
    {"qk_norm": True, "num_kv_heads": 1},
    {"qk_norm": True, "latent_norm": True, "r": 96},
    {"r": Ranks(q=16, k=32, v=48, o=64, ffn=96), "latent_activation": "silu"},
]
CASES = [(changes, how) for changes in SHAPES + UNFUSED for how in ({}, *REBUILD)]
CASES += [(changes, how | {"kernels": "triton"}) for changes in SHAPES for how in ({}, *REBUILD)]


@pytest.mark.parametrize(("changes", "execution"), CASES, ids=str)
def test_activations_are_those_measured(changes, execution):
    """fp32 on a CPU, whose RMSNorm is not one kernel and keeps its own width more a token than the
    formula has for each norm that the fused operators or recomputation leave in place. The formula
    adds one rebuilt layer, which is not there before the backward pass.
    """
    config = ModelConfig(**(SHAPE | {"num_heads": 4} | changes))
    how = Execution(**execution)
    fused = how.kernels == "triton"
    layer = memory.layer_bytes(config, 4, autocast=False, execution=how, fused=fused)
    tokens, final = 2 * 64, (2 if config.family == "llama" else 1) * 128 * 4
    formula = tokens * (config.num_layers * layer + final)
    norms = 2 * config.num_layers + 1  # the last norm is outside of the blocks
    if fused or how.recompute_qkv or how.recompute_blocks:
        norms -= config.num_layers
    if how.recompute_ffn or how.recompute_blocks:
        norms -= config.num_layers
    composite = norms * tokens * 128 * 4 if config.family == "llama" else 0
    composite += config.num_layers * tokens * inner_widths(config, how) * 4
    measured = saved_bytes(config, how, 2, 64)
    if config.document_start_id is not None:
        measured -= 2 * 64 * 64 * 4  # one mask for all layers
    assert formula + composite == pytest.approx(measured, rel=0.01)


def inner_widths(config: ModelConfig, how: Execution) -> int:
    """The widths of qk_norm and latent_norm in a block, summed, where they are not recomputed."""
    width = 0
    if not (how.recompute_qkv or how.recompute_blocks):
        width += config.qk_norm * (4 + config.num_kv_heads) * 32
        ranks = (config.ranks.q, config.ranks.k, config.ranks.v)
        width += config.latent_norm * sum(rank or 0 for rank in ranks)
    if not (how.recompute_ffn or how.recompute_blocks):
        matrices = 2 if config.family == "llama" else 1
        width += config.latent_norm * matrices * (config.ranks.ffn or 0)
    return width


@pytest.mark.parametrize(("layers", "every"), [(4, 1), (4, 2), (5, 2), (5, 3), (3, 7)])
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_activations_where_every_nth_block_is_recomputed(layers, every, kernels):
    """Without the layer that the formula has for what is rebuilt, which is none where the last
    block keeps its own.
    """
    config = ModelConfig(**(SHAPE | {"num_heads": 4, "num_layers": layers, "r": 16}))
    how = Execution(kernels=kernels, recompute_blocks=True, recompute_every=every)
    fused, tokens = kernels == "triton", 2 * 64
    formula = memory.activation_bytes(config, tokens, 4, execution=how, fused=fused)
    if how.recomputes(layers - 1):
        whole = memory.layer_bytes(config, 4, False, Execution(), fused)
        formula -= tokens * (whole - 128 * 4)
    kept = sum(not how.recomputes(index) for index in range(layers))
    composite = (kept * (1 if fused else 2) + 1) * tokens * 128 * 4
    assert formula + composite == pytest.approx(saved_bytes(config, how, 2, 64), rel=0.01)


def saved_by_graph(y: torch.Tensor, model: Transformer) -> int:
    """Bytes that the nodes behind y keep for the backward pass, without parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    nodes, kept = {y.grad_fn}, {}
    todo = list(nodes)
    while todo:
        node = todo.pop()
        for tensor in getattr(node, "saved_tensors", ()):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        following = {n for n, _ in node.next_functions if n is not None} - nodes
        nodes |= following
        todo += following
    return sum(size for storage, size in kept.items() if storage not in known)


BOTH = REBUILD[0] | REBUILD[1]
LATENT_NORM = {"r": Ranks(q=16, k=32, v=48, o=64, ffn=96), "latent_norm": True}
COMPILED = [(changes, how, True) for changes in ({}, {"r": 32}) for how in ({}, REBUILD[0], BOTH)]
COMPILED += [(LATENT_NORM, how, True) for how in ({}, BOTH)]
COMPILED += [({"r": 96, "qk_norm": True}, how, False) for how in ({}, BOTH)]


@pytest.mark.parametrize(("changes", "rebuild", "fused"), COMPILED, ids=str)
def test_activations_of_compiled_blocks(changes, rebuild, fused):
    """What the graph that Inductor compiled keeps; without the rotary table."""
    torch._dynamo.reset()
    config = ModelConfig(**(SHAPE | {"num_heads": 2, "num_layers": 1} | changes))
    kernels = "triton" if fused else "reference"
    model, how = Transformer(config), Execution(kernels=kernels, compile="on", **rebuild)
    init_weights(model, 0)
    configure(model, how, torch.device("cpu"), torch.float32)
    table = rotary_table(torch.arange(64), 64, 1e4)
    y = model.layers[0](torch.randn(2, 64, 128, requires_grad=True), table)
    measured = saved_by_graph(y, model) - sum(t.nbytes for t in table)
    formula = 2 * 64 * memory.layer_bytes(config, 4, False, how, fused, compiled=True)
    assert formula == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("r", [16, 96])
def test_low_dimensional_attention_keeps_its_latents(r):
    """4r more a token and layer, measured and by the formula."""
    vanilla, lpa = (ModelConfig(**SHAPE, num_heads=4, r=rank) for rank in (None, r))
    expected = 128 * 2 * 4 * r * 4  # tokens, layers, projections, bytes
    measured = [saved_bytes(c, Execution(), 2, 64) for c in (lpa, vanilla)]
    assert measured[0] - measured[1] == expected
    formula = [memory.activation_bytes(c, 128, 4) for c in (lpa, vanilla)]
    assert formula[0] - formula[1] == expected


@pytest.mark.parametrize(
    ("shape", "vanilla", "naive", "qkv", "both"),
    [
        ((768, 12, 2048, 128), 24_576, 25_600, 19_456, 13_824),
        ((1024, 16, 2736, 256), 32_800, 34_848, 26_656, 19_136),
    ],
    ids=["130m", "370m"],
)
def test_activation_bytes_a_token_and_layer(shape, vanilla, naive, qkv, both):
    """Compiled, bf16, counted by hand: x, x̂, q, k, v, o, x2, x̂2, gate, up and their product for
    vanilla; the latents besides for LPA; x, h, h_o, o, x2, x̂2, gate, up, product with
    recompute_qkv; neither x̂2 nor the product with recompute_ffn. The formula also has the
    statistics of attention and norm.
    """
    d, heads, f, r = shape
    sizes = {"vocab_size": 64, "hidden_size": d, "intermediate_size": f, "num_heads": heads}

    def layer(rank: int | None, fused: bool, **execution: bool) -> int:
        model = ModelConfig(**sizes, num_layers=1, r=rank)
        return memory.layer_bytes(model, 2, False, Execution(**execution), fused, compiled=True)

    statistics, rstd = 4 * heads, 4
    assert layer(None, False) == vanilla + statistics
    assert layer(r, False) == naive + statistics
    assert layer(r, True, recompute_qkv=True) == qkv + statistics + rstd
    both_bytes = layer(r, True, recompute_qkv=True, recompute_ffn=True)
    assert both_bytes == both + statistics + rstd

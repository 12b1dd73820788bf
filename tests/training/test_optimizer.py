"""Groups of parameters, and decay of the product B·A: alone, and in runs of train.py."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from model import ModelConfig, Transformer, init_weights
from tests.conftest import Runs
from tests.training.oracle import plain_run
from tests.training.test_parts import settings
from tests.training.test_train import load, metrics
from training.config import RunConfig
from training.optimizer import build_optimizer, set_learning_rate
from training.product_decay import product_gradients
from training.schedule import learning_rate


def model_config(**changes: Any) -> ModelConfig:
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1}
    return ModelConfig(**(shape | {"num_heads": 2, "r": 4, "family": "paper-1"} | changes))


def grouped(model: Transformer, **changes: Any) -> dict[str, tuple[float, float]]:
    """(weight decay, learning-rate multiplier) of each parameter, by name."""
    optimizer = build_optimizer(model, settings(weight_decay=0.3, **changes))
    assert all(group["params"] for group in optimizer.param_groups)
    of = {
        id(parameter): (group["weight_decay"], group["lr_multiplier"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    named = {name: of.pop(id(parameter)) for name, parameter in model.named_parameters()}
    assert not of
    return named


def test_only_matrices_and_embeddings_decay_unless_told_otherwise():
    found = grouped(Transformer(model_config()))
    not_decayed = {name for name, (decay, _) in found.items() if decay == 0.0}
    assert not_decayed == {name for name in found if "norm" in name or "bias" in name}
    assert {decay for decay, _ in found.values()} == {0.0, 0.3}


@pytest.mark.parametrize(
    ("no_decay", "words"),
    [
        (["norms", "biases"], ("norm", "bias")),
        (["norms"], ("norm",)),
        (["biases"], ("bias",)),
        (["embeddings", "biases"], ("embedding", "bias")),
        ([], ()),
    ],
)
@pytest.mark.parametrize("family", ["paper-1", "llama"])
def test_what_no_decay_names_does_not_decay(no_decay: list, words: tuple, family: str):
    model = Transformer(model_config(family=family))
    for name, (decay, multiplier) in grouped(model, no_decay=no_decay).items():
        assert decay == (0.0 if any(word in name for word in words) else 0.3), name
        assert multiplier == 1.0


def test_tied_head_is_the_embedding():
    model = Transformer(model_config(family="llama", tie_embeddings=True))
    found = grouped(model, no_decay=["embeddings"])
    assert found["token_embedding.weight"] == (0.0, 1.0)
    assert "lm_head.weight" not in found
    untied = Transformer(model_config(family="llama"))
    assert grouped(untied, no_decay=["embeddings"])["lm_head.weight"] == (0.3, 1.0)


@pytest.mark.parametrize(("factor_decay", "decay"), [("separate", 0.3), ("product", 0.0)])
def test_factors_have_their_multipliers_and_the_decay_of_their_kind(
    factor_decay: str, decay: float
):
    changes = {"lr_multiplier_A": 0.5, "lr_multiplier_B": 4.0, "factor_decay": factor_decay}
    model = Transformer(model_config())
    found = grouped(model, **changes)
    assert {n for n, (_, m) in found.items() if m == 0.5} == {n for n in found if n.endswith(".A")}
    assert {n for n, (_, m) in found.items() if m == 4.0} == {n for n in found if n.endswith(".B")}
    assert all(found[n] == (decay, m) for n, (_, m) in found.items() if m != 1.0)
    assert found["layers.0.feed_forward.up_proj.weight"] == (0.3, 1.0)


def test_as_few_groups_as_there_are_settings_and_each_has_the_common_ones():
    vanilla = Transformer(model_config(family="llama", r=None))
    changes = {"lr_multiplier_B": 3.0, "beta1": 0.8, "eps": 1e-5}
    optimizer = build_optimizer(vanilla, settings(**changes))
    assert len(optimizer.param_groups) == 2, "no factors, no groups for them"
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-5)
    assert len(build_optimizer(vanilla, settings(no_decay=[])).param_groups) == 1
    low_dim = build_optimizer(Transformer(model_config()), settings(**changes))
    set_learning_rate(low_dim, 0.25)
    assert sorted(group["lr"] for group in low_dim.param_groups) == [0.25, 0.25, 0.75]


def test_gradient_of_half_the_squared_norm_of_the_product_is_that_of_autograd():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(((B @ A) ** 2).sum() / 2, (A, B))
    torch.testing.assert_close(product_gradients(A, B), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("r", "changes", "expected"),
    [
        (4, {"lr_multiplier_A": 2.0, "factor_decay": "product"}, []),
        (None, {}, []),
        (None, {"lr_multiplier_A": 2.0}, ["training.lr_multiplier_A 2.0 has no effect"]),
        (None, {"lr_multiplier_B": 0.5}, ["training.lr_multiplier_B 0.5 has no effect"]),
        (None, {"factor_decay": "product"}, ["training.factor_decay product has no effect"]),
        (4, {"factor_decay": "product", "weight_decay": 0.0}, ["weight_decay is 0"]),
        ("latent_norm", {"factor_decay": "product"}, ["not the matrix that a projection applies"]),
    ],
)
def test_settings_of_factors_without_effect_are_warned_of(r: Any, changes: dict, expected: list):
    shape = {"latent_norm": True} if r == "latent_norm" else {"r": r}
    found = RunConfig(model=model_config(**shape), training=settings(**changes)).warnings()
    assert len(found) == len(expected)
    assert all(part in line for part, line in zip(expected, found, strict=True))


# A, B, what decays at the common rate and what does not: four groups.
GROUPS: dict[str, Any] = {
    "training__weight_decay": 0.5,
    "training__no_decay": ["norms", "embeddings"],
    "training__lr_multiplier_A": 0.5,
    "training__lr_multiplier_B": 2.0,
}
PRODUCT = GROUPS | {"training__factor_decay": "product"}
PAPER = {"model__family": "paper-1", "model__dropout": 0.0}
ODD = {"model__hidden_size": 15, "model__num_heads": 3, "model__r": 3}  # no factor halves
BF16 = {"training__precision": "bf16"}
OFFLOAD = {"deepspeed__offload_optimizer": "cpu"}
PLACES = [(stage, ranks, "") for stage in (0, 1, 2, 3) for ranks in (1, 2)]
PLACES += [(stage, 2, "-offload") for stage in (1, 2, 3)]


def cases(*fast: str, **settings_of: dict[str, Any]) -> list[Any]:
    """Settings by name at every ZeRO stage, on one and two ranks and with the optimizer on the CPU.
    All are slow but those named.
    """
    found = []
    for name, changes in settings_of.items():
        for stage, ranks, offload in PLACES:
            identifier = f"{name}-stage{stage}-{ranks}ranks{offload}"
            everything = changes | {"deepspeed__zero_stage": stage} | (OFFLOAD if offload else {})
            marks = [] if identifier in fast else [pytest.mark.slow]
            found.append(pytest.param(everything, ranks, id=identifier, marks=marks))
    return found


def launch(runs: Runs, config: Path, ranks: int) -> str:
    return runs.train(config, ranks=ranks, launcher="torchrun" if ranks > 1 else "python")[0]


def weights(runs: Runs, step: int) -> dict[str, Tensor]:
    folder = runs.folder / "run" / "checkpoints" / f"step-{step:08d}"
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "ranks"),
    cases(
        "product-stage0-1ranks",
        "paper-stage1-1ranks",
        "product-stage2-2ranks",
        "product-stage3-2ranks",
        product=PRODUCT,
        paper=GROUPS | PAPER,
    ),
)
def test_losses_and_weights_are_those_of_a_plain_torch_loop(
    changes: dict[str, Any], ranks: int, runs: Runs
):
    config = runs.config(**changes)
    launch(runs, config, ranks)
    records, expected = plain_run(load(config), 6)
    found = metrics(runs.folder / "run")
    assert [m["loss"] for m in found] == pytest.approx([m["loss"] for m in records], rel=2e-6)
    for name, weight in weights(runs, 6).items():
        # Adam divides gradients near zero by their own size: the plain loop in fp32 is itself up to
        # 2.5e-5 away from the same in float64.
        assert (weight - expected[name]).abs().max() < 1e-4, name


@pytest.mark.parametrize(
    ("changes", "ranks"), cases("bf16-stage2-2ranks", fp32=PRODUCT, bf16=PRODUCT | BF16)
)
def test_resumed_run_with_several_groups_is_one_that_never_stopped(
    changes: dict[str, Any], ranks: int, runs: Runs
):
    config = runs.config(**changes)
    launch(runs, config, ranks)
    folder = runs.folder / "run" / "checkpoints" / "step-00000006"
    names = ("model.safetensors", "optimizer.safetensors")
    straight = [(folder / name).read_bytes() for name in names]
    losses = [m["loss"] for m in metrics(runs.folder / "run")]
    shutil.rmtree(folder)
    assert "step-00000003" in launch(runs, config, ranks)
    assert [(folder / name).read_bytes() for name in names] == straight
    assert [m["loss"] for m in metrics(runs.folder / "run")] == losses


@pytest.mark.parametrize(
    ("changes", "ranks"),
    cases("bf16-stage1-2ranks", bf16=PRODUCT | BF16, odd=PRODUCT | PAPER | ODD),
)
def test_decay_of_the_product_alone_is_the_formula_on_fp32_weights(
    changes: dict[str, Any], ranks: int, runs: Runs
):
    """With an eps of 1e30 Adam's own update is nothing, so the weights follow the formula, which
    is computed here in float64. Bounds: rounding to fp32, once a step.
    """
    config = runs.config(**(changes | {"training__eps": 1e30, "training__weight_decay": 10.0}))
    run = load(config)
    launch(runs, config, ranks)
    model = Transformer(run.model)
    init_weights(model, run.training.seed)
    start = {n: p.detach().double() for n, p in model.named_parameters()}
    expected = dict(start)
    for step in range(6):
        lr = learning_rate(run.training, step) * 10.0
        for name in [n.removesuffix(".A") for n in start if n.endswith(".A")]:
            A, B = expected[f"{name}.A"], expected[f"{name}.B"]
            expected[f"{name}.A"] = A - 0.5 * lr * B.T @ B @ A
            expected[f"{name}.B"] = B - 2.0 * lr * B @ A @ A.T
    found = weights(runs, 6)
    for name in (n for n in start if n.endswith((".A", ".B"))):
        moved, size = (expected[name] - start[name]).norm(), start[name].norm()
        assert moved > 5e-4 * size, name  # else the bounds below could hold without it
        assert (found[name] - expected[name]).norm() < 1e-5 * moved + 2e-7 * size, name


@pytest.mark.parametrize(
    ("changes", "ranks"), cases("fp32-stage0-1ranks", "fp32-stage1-1ranks", fp32=PRODUCT)
)
def test_product_does_not_decay_in_a_step_that_is_left_out(
    changes: dict[str, Any], ranks: int, runs: Runs
):
    """A learning rate of 1e30 blows up the weights in the first step; later ones are skipped."""
    config = runs.config(
        **changes,
        data__final_split=None,
        training__learning_rate=1.0e30,
        training__warmup_steps=0,
        training__schedule="constant",
        training__max_steps=3,
        training__checkpoint_every=1,
        training__keep_checkpoints=None,
    )
    launch(runs, config, ranks)
    assert [m["skipped_steps"] for m in metrics(runs.folder / "run")] == [0, 1, 2]
    first, last = weights(runs, 1), weights(runs, 3)
    assert all(torch.equal(last[name], weight) for name, weight in first.items())

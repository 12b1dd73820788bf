"""A training step of our vanilla model against transformers' LlamaForCausalLM on the CPU in fp32.

A step is what a training loop does between two batches: gradients to None, forward, backward,
clipping to norm 1 and torch's fused AdamW, alike on both sides; the weights are equal at the
start. Theirs is called as their users call it, labels = input_ids: the shift, the loss and the
logits of the whole batch are transformers' own. Ours gets the targets that they make of it. Their
compiled side is torch.compile(model), ours is execution.compile: on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import ModelConfig, Transformer, init_weights
from model.configure import configure
from model.execution import Execution
from training.bench.hugging_face import llama, next_tokens
from training.bench.measure import (
    Row,
    Step,
    compare_steps,
    measurement,
    merge,
    ratio,
    tokens_per_second,
)
from training.bench.profiling import seconds_by_group

TOLERANCE = 1e-5
GOALS = {"eager": 1.05, "compiled": 1.15}
SEED = 0
# With 0.02 the loss of a new model hardly depends on its attention.
INIT_STD, QUICK_INIT_STD = 0.1, 0.3


@dataclass
class Case:
    """A model, a batch (B, T), how often to repeat, eager or compiled or both."""

    model: ModelConfig
    batch: int
    seq_len: int
    rounds: int
    modes: tuple[str, ...] = tuple(GOALS)

    def name(self) -> str:
        m = self.model
        return f"d={m.hidden_size} L={m.num_layers} V={m.vocab_size} {self.batch}×{self.seq_len}"


def cases(quick: bool) -> list[Case]:
    """What is measured."""
    if quick:  # compiling takes half a minute
        tiny = ModelConfig(64, 32, 48, 2, 2, max_seq_len=16, init_std=QUICK_INIT_STD)
        return [Case(tiny, 2, 16, 3, ("eager",))]
    small = ModelConfig(4096, 256, 688, 4, 4, max_seq_len=256, init_std=INIT_STD)
    large = ModelConfig(8192, 512, 1376, 8, 8, max_seq_len=256, init_std=INIT_STD)
    return [Case(small, 8, 256, 20), Case(large, 4, 256, 12)]


def vanilla(config: ModelConfig) -> Transformer:
    """The model with its initial weights."""
    model = Transformer(config)
    init_weights(model, SEED)
    return model.train()


def training_step(loss: Callable[..., Tensor], model: nn.Module, *inputs: Tensor) -> Step:
    """A step of a model whose loss is loss(*inputs)."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.1, fused=True)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        value = loss(*inputs)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(value.detach())

    return step


def our_step(case: Case, tokens: Tensor, compiled: bool) -> Step:
    """A step of our model, executed as train.py would have it."""
    model = vanilla(case.model)
    execution = Execution(compile="on" if compiled else "off")
    configure(model, execution, torch.device("cpu"), torch.float32)
    return training_step(model, model, tokens, next_tokens(tokens))


def their_step(case: Case, tokens: Tensor, compiled: bool) -> Step:
    """A step of transformers' model."""
    model = llama(vanilla(case.model))
    called = torch.compile(model) if compiled else model

    def loss(tokens: Tensor) -> Tensor:
        value: Tensor = called(input_ids=tokens, labels=tokens, use_cache=False).loss
        return value

    return training_step(loss, model, tokens)


def measure_case(case: Case) -> Row:
    """Eager and compiled, both sides, all four in turn."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (case.batch, case.seq_len)
    tokens = torch.randint(0, case.model.vocab_size, shape, generator=generator)
    sides: dict[str, Step] = {}
    for mode in case.modes:
        sides[f"ours, {mode}"] = our_step(case, tokens, mode == "compiled")
        sides[f"transformers, {mode}"] = their_step(case, tokens, mode == "compiled")
    name = case.name()
    seconds, losses = compare_steps(name, sides, case.rounds, TOLERANCE)
    rows = [measurement(name, side, values) for side, values in seconds.items()]
    ratios = [
        ratio(
            name,
            f"tokens/s against transformers, {mode}",
            seconds[f"transformers, {mode}"],
            seconds[f"ours, {mode}"],
            GOALS[mode],
        )
        for mode in case.modes
    ]
    return {
        "measurements": tokens_per_second(rows, case.batch * case.seq_len),
        "ratios": ratios,
        "losses": [losses | {"case": name}],
        "profiles": [
            {"case": name, "side": side, "seconds": seconds_by_group(sides[side], 2)}
            for side in sides
            if side.endswith("eager")
        ],
    }


def measure(quick: bool = False) -> Row:
    """All cases."""
    return merge([measure_case(case) for case in cases(quick)]) | {"seed": SEED}

"""Our engine on two gloo ranks against plain torch DistributedDataParallel with AdamW, fp32, one
thread a rank.

The engine's side is training.engine.Engine.train_step, with all that it does beside the step: the
learning rate, the gradient's norm, leaving out steps that are not finite. The other side is what
torch's documentation shows: DDP with its defaults, backward, clip_grad_norm_, the same fused AdamW.
Each stage has a pair of processes of its own, with DDP in the same processes, since stage 3 changes
torch's functions for the whole process. Either step ends with a wait for the other rank.
"""

import itertools
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model import ModelConfig, Transformer, init_weights
from training import distributed
from training.bench import processes
from training.bench.measure import (
    Row,
    Step,
    compare_steps,
    measurement,
    merge,
    ratio,
    tokens_per_second,
)
from training.clock import StepClock
from training.config import DeepSpeedConfig, RunConfig, TrainingConfig
from training.optimizer import build_optimizer
from training.schedule import learning_rate

Stage = Literal[0, 1, 2, 3]

RANKS = 2
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
TOLERANCE = 1e-5
GOAL = 0.95  # of stage 0, which does the same as DDP
SEED = 0


@dataclass
class Case:
    """A vanilla model (family llama, heads of 64 or 16), a global batch (B, T), the rounds."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    vocab_size: int
    batch: int
    seq_len: int
    rounds: int
    stage: Stage

    def name(self) -> str:
        return (
            f"d={self.hidden_size} L={self.num_layers} V={self.vocab_size} "
            f"{self.batch}×{self.seq_len}, {RANKS} ranks"
        )

    def run(self) -> RunConfig:
        """The configuration that the engine gets."""
        heads = max(2, self.hidden_size // 64)
        model = ModelConfig(
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.num_layers,
            heads,
            max_seq_len=self.seq_len,
        )
        training = TrainingConfig(
            run_dir="unused",
            max_steps=1_000_000,
            schedule="constant",
            global_batch_size=self.batch,
            seq_len=self.seq_len,
            learning_rate=1e-4,
            seed=SEED,
        )
        return RunConfig(model, training, deepspeed=DeepSpeedConfig(zero_stage=self.stage))


def cases(quick: bool) -> list[Case]:
    """What is measured: the demo's shape at every stage, and a larger model at stage 0."""
    if quick:
        return [Case(32, 48, 2, 64, 4, 16, 3, stage) for stage in STAGES[::3]]
    demo = [Case(192, 512, 4, 4096, 8, 256, 20, stage) for stage in STAGES]
    return [*demo, Case(512, 1376, 4, 4096, 4, 256, 20, 0)]


def measure(quick: bool = False) -> Row:
    """Every case in two fresh processes."""
    return merge([measure_case(case) for case in cases(quick)]) | {"seed": SEED}


def measure_case(case: Case) -> Row:
    """Two processes, one a rank."""
    port = processes.free_port()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = processes.python(
            "-m", "training.bench.ddp_rank", json.dumps(asdict(case)), str(output)
        )
        processes.run_all(
            [command] * RANKS,
            [processes.rank_environment(rank, RANKS, port) for rank in range(RANKS)],
        )
        result: Row = json.loads(output.read_text())
    return result


def measure_rank(case: Case) -> Row:
    """What each rank does: both sides in turn. The result is that of rank 0."""
    run = case.run()
    device = distributed.init_distributed()
    generator = torch.Generator().manual_seed(SEED)
    shape = (RANKS, case.batch // RANKS, case.seq_len + 1)
    tokens = torch.randint(0, case.vocab_size, shape, generator=generator)[distributed.rank()]
    sides = {
        "DDP": together(ddp_step(run, tokens)),
        f"ZeRO stage {case.stage}": together(engine_step(run, tokens, device)),
    }
    name = case.name()
    seconds, losses = compare_steps(name, sides, case.rounds, TOLERANCE)
    rows = [measurement(name, side, values) for side, values in seconds.items()]
    ddp, ours = seconds
    quantity = f"tokens/s of {ours} against DDP"
    goal = GOAL if case.stage == 0 else None
    return {
        "measurements": tokens_per_second(rows, case.batch * case.seq_len),
        "ratios": [ratio(name, quantity, seconds[ddp], seconds[ours], goal)],
        "losses": [losses | {"case": f"{name}, {ours}"}],
    }


def engine_step(run: RunConfig, tokens: Tensor, device: torch.device) -> Step:
    """A step of our engine."""
    from training.engine import Engine  # DeepSpeed takes seconds to import

    engine = Engine(run, device)
    steps, clock = itertools.count(), StepClock(device, untimed_steps=0)

    def step() -> float:
        losses, _ = engine.train_step(next(steps), lambda: tokens, clock)
        return float(losses.mean())

    return step


def ddp_step(run: RunConfig, tokens: Tensor) -> Step:
    """A step of plain torch with the same weights, groups of parameters and learning rate."""
    model = Transformer(run.model)
    init_weights(model, run.training.seed)
    optimizer = build_optimizer(model, run.training)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(run.training, 0)
    wrapped = DistributedDataParallel(model.train())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = wrapped(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), run.training.gradient_clipping)
        optimizer.step()
        return float(loss.detach())

    return step


def together(step: Step) -> Step:
    """The step, and then a wait for the other rank: all ranks begin the next one at once, and this
    one takes as long as the slower rank's.
    """

    def step_of_all() -> float:
        loss = step()
        dist.barrier()
        return loss

    return step_of_all

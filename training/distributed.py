"""Ranks: how a process joins the others, and how it leaves them."""

import os
import socket
import sys
import warnings
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from data.errors import InputError

STOPPED_EARLY = 75  # EX_TEMPFAIL: a signal came, a checkpoint is saved, start again to go on


def init_distributed() -> torch.device:
    """Joins the process group of `deepspeed`, `torchrun` or (alone) plain `python`; the device.

    NCCL where there is a GPU, gloo on the CPU.
    """
    join_environment()
    cuda = torch.cuda.is_available()
    if cuda:
        if local_rank() >= torch.cuda.device_count():
            error = InputError(
                f"rank {rank()} wants GPU {local_rank()} of this machine, which has "
                f"{torch.cuda.device_count()}; start at most one rank a GPU"
            )
            error.any_rank = True
            raise error
        torch.cuda.set_device(local_rank())
    else:
        torch.set_num_threads(max(1, _cpu_cores() // int(os.environ["LOCAL_WORLD_SIZE"])))
        # MKL's mode of equal results from run to run, read at its first call: a resumed run has to
        # have the digits of one that never stopped.
        os.environ.setdefault("MKL_CBWR", "AUTO")
        # DeepSpeed looks for an accelerator at import and prints a warning where it finds none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    return torch.device("cuda", local_rank()) if cuda else torch.device("cpu")


def evaluation_device(choice: str) -> torch.device:
    """The device for a command without DeepSpeed: "auto", "cpu" or "cuda"; joins other ranks."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: cuda was asked for, and this machine has no usable GPU")
    if "WORLD_SIZE" in os.environ and choice == "auto":
        return init_distributed()
    if world_size() > 1:
        raise InputError(f"--device: {choice} works with one process; use auto with a launcher")
    return torch.device("cuda" if choice != "cpu" and torch.cuda.is_available() else "cpu")


def join_environment() -> None:
    """Completes RANK, WORLD_SIZE and the like, which torch reads, where no launcher set them."""
    if "RANK" not in os.environ:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # torchrun sets LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE.
    os.environ.setdefault(
        "LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"])
    )


def prepare_deepspeed() -> None:
    """Imports DeepSpeed with its surprises on a machine without a GPU switched off."""
    warnings.filterwarnings("ignore", ".*is deprecated.*", FutureWarning)  # torch 2.13 on ZeRO 1-3
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if not torch.cuda.is_available():
        # Only inference uses this op, but init_distributed would compile it (23 s, needs a C++
        # compiler and ninja, and waits for ever on the lock of a compilation that was killed).
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _cpu_cores() -> int:
    """Cores that this process may run on: taskset and Slurm leave some out, and threads that share
    a core wait for each other. Quotas of CPU time are not looked at.
    """
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    return min(cores, len(os.sched_getaffinity(0)))


def rank() -> int:
    """This process's rank in the job."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its node: its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of ranks."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def barrier() -> None:
    """Waits for every rank."""
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """The element-wise sum over all ranks, on every rank."""
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(values)
    return values


def collective_device() -> torch.device:
    """Where tensors of a collective must live: NCCL takes those of the GPU alone."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda", local_rank()) if nccl else torch.device("cpu")


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not dist.is_initialized() or world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=collective_device())
    return box[0]


def leave(code: int) -> NoReturn:
    """Ends the process; on success every rank must have passed its last collective.

    Where there is a gloo group (with NCCL, that of training/signals.py) the interpreter is not
    finalised: torch 2.13's worker threads race with that and abort about one run in twenty, after
    its work is done. After a failure other ranks may be waiting in a collective that this one will
    never enter, so nothing is torn down either: the launcher ends them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.is_initialized():
        if dist.get_backend() == "nccl" and code in (0, STOPPED_EARLY):
            dist.destroy_process_group()
        os._exit(code)
    sys.exit(code)

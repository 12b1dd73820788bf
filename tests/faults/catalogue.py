"""The faults: what is done to a running job of two ranks, and what must hold after it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        done: What is done.
        holds: What the tests find afterwards.
    """

    done: str
    holds: str


GOES_ON = "the same command goes on and ends bit-equal to an undisturbed run"

FAULTS = {
    "kill-rank": Fault(
        "SIGKILL to one rank inside a step",
        f"the launcher ends the other rank; {GOES_ON}",
    ),
    "kill-in-save": Fault(
        "SIGKILL to rank 0 while it writes a checkpoint",
        f"what was begun has no checkpoint's name and is removed at the next start; {GOES_ON}",
    ),
    "signal-rank": Fault(
        "SIGTERM or SIGUSR1 to one rank",
        f"both ranks leave after the same step with a checkpoint; {GOES_ON}",
    ),
    "signal-torchrun": Fault(
        "SIGTERM to `torchrun`",
        f"passed on: both ranks leave after the same step with a checkpoint; {GOES_ON}",
    ),
    "signal-deepspeed": Fault(
        "SIGTERM to the outer `deepspeed`",
        "it ends alone, the ranks train on; a second start is refused while they live, and names "
        f"the process; SIGTERM to that one saves; {GOES_ON}",
    ),
    "ctrl-c": Fault(
        "Ctrl-C: SIGINT to the launcher's process group",
        f"both ranks leave after the same step with a checkpoint; {GOES_ON}",
    ),
    "ctrl-c-twice": Fault(
        "Ctrl-C twice while a step lasts",
        "under `deepspeed` the ranks end at once, without a checkpoint; under `torchrun` "
        f"they save after the step if it ends within 30 s; {GOES_ON}",
    ),
    "signal-in-accumulation": Fault(
        "SIGUSR1 between two micro-batches of a step",
        f"takes effect after that step; {GOES_ON}",
    ),
    "disk-full": Fault(
        "no space for a checkpoint on a small file system",
        "exit code 2 on both ranks, nothing half-written stays; with space again "
        "the same command goes on and ends bit-equal",
    ),
    "disk-full-in-write": Fault(
        "the small file system fills up in the middle of a checkpoint's files",
        "as above",
    ),
    "file-limit": Fault(
        "rank 0 reaches a file size limit (RLIMIT_FSIZE) inside a checkpoint's file",
        "as above",
    ),
    "altered-shard": Fault(
        "one bit of a prepared shard changes between two starts",
        f"refused with exit code 2, the file is named; once restored, {GOES_ON}",
    ),
    "checkpoint-truncated": Fault(
        "the newest checkpoint's optimizer.safetensors is cut",
        f"put aside with a warning that names the file, the one before is taken; {GOES_ON}",
    ),
    "checkpoint-missing": Fault("the newest checkpoint's model.safetensors is removed", "as above"),
    "checkpoint-altered": Fault(
        "one bit of the newest checkpoint's model.safetensors changes", "as above"
    ),
    "checkpoint-no-json": Fault("the newest checkpoint.json is not JSON", "as above"),
    "clock-back": Fault(
        "the clock jumps back by a day in the middle of a run, and the older checkpoint's files "
        "get times in the future",
        f"the checkpoint of the highest step is taken; {GOES_ON}",
    ),
    "nan-gradient": Fault(
        "the gradient of rank 1 is NaN for two steps",
        "both steps are left out on both ranks and counted; the ranks' weights stay equal",
    ),
    "nan-in-a-row": Fault(
        "the gradient of rank 1 is NaN from a step on",
        f"exit code 2 after training.max_skipped_steps steps in a row; without NaN {GOES_ON}",
    ),
    "two-runs": Fault(
        "a second job on the same run directory",
        "the second is refused with exit code 2 and names the process; the first ends bit-equal",
    ),
    "stopped-rank": Fault(
        "SIGSTOP to one rank, SIGCONT after a while",
        "the other rank waits; after SIGCONT the run ends bit-equal",
    ),
}

"""A worker: starts the runs of a study one after another. Several may work on one study."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import filelock

from data.errors import USER_ERROR, InputError
from eval.study.config import PlannedRun, StudyConfig
from eval.study.progress import Arm, arm_state, in_order, over
from training.distributed import STOPPED_EARLY
from training.signals import STOPPING

TRAIN = Path(__file__).resolve().parent.parent.parent / "train.py"
LOG_LINES = 5  # of a failed run, in the error
Say = Callable[[str], None]


class Worker:
    """Runs a study to its end, or to a signal, which it hands on to the run at work."""

    def __init__(self, study: StudyConfig, say: Say, poll_seconds: float = 10.0) -> None:
        self.study, self.say, self.poll_seconds = study, say, poll_seconds
        self.child: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.console_from = 0  # where the output of the run at work begins in its console.txt

    def listen(self) -> None:
        """Takes over the signals that stop a run."""
        for number in STOPPING:
            signal.signal(number, self._stop)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopped = True
        if self.child is not None:  # the ranks end after the step that they are in
            self.child.send_signal(number)

    def work(self) -> list[Arm] | None:
        """Starts runs until none is left; the arms then, or None after a signal.

        InputError where a run fails for any reason but a loss that is not finite.
        """
        waiting_for_others = False
        while not self.stopped:
            arms = [arm_state(self.study, name) for name in self.study.arm_names]
            todo = in_order(self.study, arms)
            if not todo:
                return arms
            if self._take_one(todo):
                waiting_for_others = False
                continue
            if not waiting_for_others:
                self.say(f"{len(todo)} runs are at work elsewhere; waiting")
                waiting_for_others = True
            time.sleep(self.poll_seconds)
        return None

    def _take_one(self, todo: list[PlannedRun]) -> bool:
        """Runs the first that no other worker has; False where there is none."""
        for run in todo:
            lock = Path(self.study.run_dir) / "locks" / f"{run.name.replace('/', '-')}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            try:
                with filelock.FileLock(lock, timeout=0):
                    if over(run) is not None:  # it has ended since it was listed
                        return True
                    # train.py outlives a worker that was killed, and holds this one.
                    run.folder.mkdir(parents=True, exist_ok=True)
                    with filelock.FileLock(run.folder / ".lock", timeout=0):
                        pass
                    self._run(run, len(todo))
                    return True
            except filelock.Timeout:
                continue
        return False

    def _run(self, run: PlannedRun, left: int) -> None:
        config = run.folder / "study.yaml"
        config.write_text(run.config.to_yaml(), encoding="utf-8")
        self.say(f"{run.name}: begins ({left} known to be left, {run.flops:.2e} FLOPs)")
        begun = time.monotonic()
        command = shlex.split(self.study.launcher) if self.study.launcher else [sys.executable]
        with (run.folder / "console.txt").open("ab") as console:
            self.console_from = console.tell()
            # A session of its own: Ctrl-C reaches it through us, once.
            self.child = subprocess.Popen(
                [*command, str(TRAIN), "--config", str(config)],
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = self.child.wait()
            self.child = None
        self._report(run, code, time.monotonic() - begun)

    def _report(self, run: PlannedRun, code: int, seconds: float) -> None:
        if self.stopped or code == STOPPED_EARLY:
            self.stopped = True
            self.say(f"{run.name}: stopped by a signal; start the same command again to go on")
            return
        found = over(run)
        if found is None:
            said = (run.folder / "console.txt").read_bytes()[self.console_from :]
            lines = said.decode(errors="replace").splitlines()
            last = " | ".join(lines[-1:] if code == USER_ERROR else lines[-LOG_LINES:])
            raise InputError(f"{run.name}: train.py ended with code {code}: {last}")
        loss = found.last_validation_loss
        says = "diverged" if found.diverged else f"validation loss {loss}"
        self.say(f"{run.name}: {says}, {seconds / 60:.1f} min")
        checkpoints = run.folder / "checkpoints"
        if run.trial and not self.study.keep_trial_checkpoints and checkpoints.exists():
            shutil.rmtree(checkpoints)

"""Kills, full disks and two writers, with real processes where the point is the process."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import prepare
from data.shards import PreparedData
from tests.data.conftest import make_texts
from tests.data.test_prepare import content, write_jsonl


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> list[Path]:
    """Four files that take a second or two to tokenise in one process."""
    folder = tmp_path_factory.mktemp("large")
    parts = [make_texts(250, words=450, seed=n) for n in range(4)]
    parts[1].insert(7, "")
    return [write_jsonl(folder / f"{n}.jsonl", texts) for n, texts in enumerate(parts)]


def arguments(inputs: list[Path], out: Path, model_file: Path) -> list[str]:
    options = ["--input", *inputs, "--output", out, "--tokenizer", model_file]
    return [str(o) for o in [*options, "--shard_tokens", 20_000, "--valid_fraction", 0.2]]


@pytest.fixture(scope="module")
def uninterrupted(large, tmp_path_factory, model_file) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("reference") / "out"
    assert prepare.main([*arguments(large, out, model_file), "--processes", "1"]) == 0
    return content(out)


def start(argv: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "data.prepare", *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    raise AssertionError("waited in vain")


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at /proc")
def test_kill_9_and_go_on(large, tmp_path, model_file, uninterrupted, run_prepare):
    out = tmp_path / "out"
    argv = [*arguments(large, out, model_file), "--processes", "2"]
    kept: dict[Path, int] = {}
    for shards in (2, 8):  # twice in a row
        process = start(argv)
        wait_for(lambda n=shards: len(list(out.glob("*.tokens.bin"))) >= n, process)
        workers = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (out / "manifest.json").exists()
        assert (out / "progress.json").exists()
        wait_for_exit(workers)
        for file, written in kept.items():
            assert file.stat().st_mtime_ns == written  # finished shards are not written again
        kept |= {f: f.stat().st_mtime_ns for f in out.glob("*.tokens.bin")}
    result = run_prepare(*argv[:-1], 1)
    assert result.code == 0
    assert "going on after" in result.err
    assert content(out) == uninterrupted
    assert {f: f.stat().st_mtime_ns for f in kept} == kept


def wait_for_exit(pids: list[int]) -> None:
    """Workers of a killed parent must not stay behind."""
    for _ in range(400):
        if not any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in pids):
            return
        time.sleep(0.01)
    raise AssertionError(f"still alive: {pids}")


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def stop_after(shards: int, monkeypatch) -> None:
    """Make the preparation stop with an error of its own after some commits."""
    commit = prepare.ShardWriter.commit
    left = [shards]

    def counted(self) -> None:
        commit(self)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(prepare.ShardWriter, "commit", counted)


def test_finished_documents_are_not_tokenised_again(
    large, tmp_path, model_file, uninterrupted, run_prepare, monkeypatch
):
    out = tmp_path / "out"
    argv = [*arguments(large, out, model_file), "--processes", "1"]
    monkeypatch.setattr(prepare, "COMMIT_TOKENS", 30_000)
    with monkeypatch.context() as patch:
        stop_after(22, patch)
        assert run_prepare(*argv).code == 130
    position = json.loads((out / "progress.json").read_text())["position"]
    assert position["source"] >= 1

    from data.encode import Encoder

    seen: list[int] = []
    encode = Encoder.__call__

    def counted(self, batch):
        seen.extend([batch.source] * len(batch.texts))
        return encode(self, batch)

    monkeypatch.setattr(Encoder, "__call__", counted)
    assert run_prepare(*argv).code == 0
    assert min(seen) == position["source"]
    first = 251 if position["source"] == 1 else 250
    assert seen.count(position["source"]) == first - position["documents_of_source"]
    assert content(out) == uninterrupted


def test_a_restart_with_other_options_or_inputs_is_refused(
    large, tmp_path, model_file, run_prepare, monkeypatch
):
    out = tmp_path / "out"
    inputs = [Path(shutil.copy(file, tmp_path)) for file in large[:2]]
    argv = [*arguments(inputs, out, model_file), "--processes", "1"]
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        assert run_prepare(*argv).code == 130
    result = run_prepare(*argv, "--split_seed", 1)
    assert result.code == 2
    assert "was prepared with split_seed 0, now it is 1" in result.err
    os.utime(inputs[1], (1, 1))
    result = run_prepare(*argv)
    assert result.code == 2
    assert f"input {inputs[1]} changed since" in result.err
    assert run_prepare(*argv, "--overwrite").code == 0
    PreparedData.open(out)


def test_max_documents_across_a_restart(large, tmp_path, model_file, run_prepare, monkeypatch):
    options = ["--processes", "1", "--max_documents", "300"]
    for name in ("whole", "parts"):
        argv = [*arguments(large, tmp_path / name, model_file), *options]
        if name == "parts":
            with monkeypatch.context() as patch:
                stop_after(12, patch)
                assert run_prepare(*argv).code == 130
        assert run_prepare(*argv).code == 0
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_changed_set_of_options_is_fine_before_the_first_commit(
    tmp_path, model_file, run_prepare
):
    """Whoever corrects a wrong --text_key must not be told to overwrite nothing."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"content": "x"}) + "\n")
    argv = ["--input", path, "--output", tmp_path / "out", "--tokenizer", model_file]
    assert run_prepare(*argv).code == 2
    assert run_prepare(*argv, "--text_key", "content").code == 0


def test_a_tokenizer_of_other_options_is_not_kept(tmp_path, run_prepare):
    """Stopped behind the tokenizer's training, at a bad line; then run with another vocabulary."""
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(40))
    good = path.read_text()
    path.write_text(good + "bad")
    argv = ["--input", path, "--output", tmp_path / "out", "--processes", 1]
    argv += ["--tokenizer_sample_bytes", 4000]
    assert run_prepare(*argv, "--vocab_size", 300).code == 2
    assert (tmp_path / "out" / "tokenizer.model").exists()
    path.write_text(good)
    assert run_prepare(*argv, "--vocab_size", 310).code == 0
    assert PreparedData.open(tmp_path / "out").tokenizer.vocab_size == 310


def test_stopped_between_manifest_and_the_end(large, tmp_path, model_file, run_prepare):
    out = tmp_path / "out"
    argv = arguments(large[:1], out, model_file)
    assert run_prepare(*argv, "--processes", 1).code == 0
    (out / "progress.json").write_text("{}")
    assert "already prepared" in run_prepare(*argv).out
    assert not (out / "progress.json").exists()


def test_a_second_writer_is_refused(large, tmp_path, model_file, run_prepare):
    from filelock import FileLock

    out = tmp_path / "out"
    out.mkdir()
    holder = (
        f"from filelock import FileLock\nwith FileLock({str(out / prepare.LOCK)!r}):\n"
        "    print('held', flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        result = run_prepare(*arguments(large, out, model_file))
    finally:
        process.communicate("\n")
    assert result.code == 2
    assert "another prepare is writing there" in result.err
    assert result.err.count("\n") == 1
    with FileLock(out / prepare.LOCK, timeout=0):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(small_disk, large, model_file, uninterrupted, run_prepare):
    out = small_disk / "out"
    argv = [*arguments(large, out, model_file), "--processes", "1"]
    for _ in range(2):
        result = run_prepare(*argv)
        assert result.code == 2
        lines = result.err.splitlines()
        assert lines[-1].startswith(f"error: no space left on device: {out}/")
        assert "Traceback" not in result.err
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run_prepare(*argv).code == 0
    assert content(out) == uninterrupted


def test_file_size_limit(large, tmp_path, model_file, uninterrupted, run_prepare):
    """The same without root: a limit on the size of a file stands in for the full disk."""
    out = tmp_path / "out"
    argv = [*arguments(large, out, model_file), "--processes", "1"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        result = run_prepare(*argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.code == 2
    assert result.err.startswith("error: no space left on device (file size limit reached): ")
    assert result.err.count("\n") == 1
    assert run_prepare(*argv).code == 0
    assert content(out) == uninterrupted

import errno
import subprocess
import sys

import pytest

from data.errors import InputError, run_cli


def outcome(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as exit_:
        run_cli(main)
    return exit_.value.code, capsys.readouterr().err


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize("code", [None, 0, 75])
def test_exit_code_is_mains(code, capsys):
    assert outcome(lambda: code, capsys) == (code or 0, "")


def test_input_error_is_one_line(capsys):
    code, err = outcome(raising(InputError("bad\nkey")), capsys)
    assert (code, err) == (2, "error: bad key\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk_names_the_file(number, capsys):
    code, err = outcome(raising(OSError(number, "whatever", "/disk/file")), capsys)
    assert code == 2
    assert err.startswith("error: no space left on device")
    assert err.endswith(": /disk/file\n")


@pytest.mark.parametrize(
    "error", [FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError]
)
def test_path_errors_are_one_line(error, capsys):
    code, err = outcome(raising(error(1, "Some reason", "/some/file")), capsys)
    assert (code, err) == (2, "error: some reason: /some/file\n")


def test_interrupt(capsys):
    assert outcome(raising(KeyboardInterrupt()), capsys) == (130, "")


@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O", "f"), ValueError("x"), KeyError("y")])
def test_defects_keep_their_traceback(error):
    with pytest.raises(type(error)):
        run_cli(raising(error))


@pytest.mark.parametrize(
    ("rank", "local_rank", "prints"),
    [(None, None, True), ("0", "0", True), ("3", "1", False), ("4", "0", True), ("3", None, True)],
)
def test_one_rank_of_a_node_prints(rank, local_rank, prints, monkeypatch, capsys):
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    code, err = outcome(raising(InputError("bad")), capsys)
    assert (code, bool(err)) == (2, prints)


def test_a_real_process_prints_no_traceback():
    script = "from data.errors import *\ndef main(): raise InputError('no')\nrun_cli(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: no\n")


@pytest.mark.parametrize("alone", [False, True])
def test_an_error_of_one_rank_alone_is_printed_by_it(alone, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    error = InputError("the disk of this rank is full")
    error.any_rank = alone

    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        run_cli(main)
    assert ended.value.code == 2
    assert ("the disk of this rank is full" in capsys.readouterr().err) == alone

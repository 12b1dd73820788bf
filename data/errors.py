"""The one exception for wrong user input, and how a command line ends.

Exit codes: 0 done, 2 the user's input (or the disk) is at fault and one line on stderr says how,
130 interrupted. Any other exception is a defect and keeps its traceback.
"""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

USER_ERROR = 2
INTERRUPTED = 130

_NO_SPACE = {
    errno.ENOSPC: "no space left on device",
    errno.EDQUOT: "no space left on device (disk quota exceeded)",
    errno.EFBIG: "no space left on device (file size limit reached)",
}
_PATH_ERRORS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)


class InputError(ValueError):
    """The user's input is wrong.

    The message is one line: what is wrong, where (file, key or option) and what is allowed.
    Most are found by every rank alike, and one of a node prints them; with `any_rank` the rank that
    raises it prints it, because it alone may know.
    """

    any_rank = False


def require_folder_of(output: str | Path | None, option: str = "--output") -> None:
    """InputError, before any work is done, where a result could not be written to this file."""
    if output is None:
        return
    if not Path(output).absolute().parent.is_dir():
        raise InputError(f"{option} {output}: the folder {Path(output).parent} does not exist")
    if Path(output).is_dir():
        raise InputError(f"{option} {output}: it is a folder; a file is expected")


def run_cli(
    main: Callable[[], int | None], leave: Callable[[int], NoReturn] = sys.exit
) -> NoReturn:
    """Run `main` and end the process with its exit code, or with the code of the error it raised.

    Errors of the user are one line on stderr. On a node with several ranks only the one with
    LOCAL_RANK 0 prints it. `leave` ends the process.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of our output has enough, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (InputError, OSError) as error:
        message = _user_message(error)
        if message is None:
            raise
        if _prints_errors() or getattr(error, "any_rank", False):
            print(f"error: {message}", file=sys.stderr)
        code = USER_ERROR
    sys.stdout.flush()
    sys.stderr.flush()
    leave(code)


def _user_message(error: InputError | OSError) -> str | None:
    """One line for the user, or None where `error` is a defect of ours."""
    if isinstance(error, InputError):
        return " ".join(str(error).splitlines())
    file = error.filename if error.filename is not None else "(unnamed file)"
    if error.errno in _NO_SPACE:
        return f"{_NO_SPACE[error.errno]}: {file}"
    if error.errno == errno.ENAMETOOLONG:
        return f"file name too long: {file}"
    if isinstance(error, _PATH_ERRORS) and error.filename is not None:
        return f"{(error.strerror or type(error).__name__).lower()}: {file}"
    return None


def _prints_errors() -> bool:
    return "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"

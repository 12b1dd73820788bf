"""A folder that is written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from data.errors import InputError


def require_new(output: Path) -> None:
    """InputError where the folder exists, also an empty one, or could not be made."""
    if output.exists() or output.is_symlink():
        raise InputError(f"--output {output}: it exists; give a folder that does not")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist")


@contextmanager
def aside(output: Path) -> Iterator[Path]:
    """A folder beside `output`, which takes its name at the end, or is removed after an error."""
    folder = output.with_name(f".{output.name}.{os.getpid()}.partial")
    folder.mkdir()
    try:
        yield folder
        require_new(output)  # somebody else may have been faster
        folder.rename(output)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how it reports a full disk
            raise InputError(f"--output {output}: cannot be written ({error})") from None
        raise

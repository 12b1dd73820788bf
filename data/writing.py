"""Folders that are written whole or not at all."""

import errno
import os
import secrets
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
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, which takes its name once its files are on the disk, or is removed
    after an error. What has that name by then stays, unless it is an empty folder.
    """
    aside = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    aside.mkdir()
    try:
        yield aside
        for path in (*sorted(aside.rglob("*")), aside):
            flush_to_disk(path)
        require_new(output)
        try:
            aside.rename(output)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            require_new(output)  # somebody else was faster
            raise
        flush_to_disk(output.absolute().parent)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how it reports a full disk
            raise InputError(f"--output {output}: cannot be written ({error})") from None
        raise


def put_in_place(aside: Path, folder: Path) -> None:
    """Gives a complete folder its name; one that has it already goes when the new one is there."""
    recover(folder)
    replaced = _replaced(folder)
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(folder: Path) -> None:
    """Mends what a process that was killed in put_in_place left: a whole folder has its name."""
    replaced = _replaced(folder)
    if replaced.exists() and not folder.exists():
        replaced.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced")


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

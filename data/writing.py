"""Folders that are written whole or not at all."""

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
def new_folder(output: Path) -> Iterator[Path]:
    """A folder beside `output`, which takes its name once its files are on the disk, or is removed
    after an error.
    """
    aside = output.with_name(f".{output.name}.{os.getpid()}.partial")
    aside.mkdir()
    try:
        yield aside
        for path in (*sorted(aside.iterdir()), aside):
            flush_to_disk(path)
        require_new(output)  # somebody else may have been faster
        put_in_place(aside, output)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how it reports a full disk
            raise InputError(f"--output {output}: cannot be written ({error})") from None
        raise


def put_in_place(aside: Path, folder: Path) -> None:
    """Gives a complete folder its name; one that has it already goes when the new one is there."""
    replaced = folder.with_name(folder.name + ".replaced")
    if folder.exists():
        folder.rename(replaced)
    aside.rename(folder)
    flush_to_disk(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

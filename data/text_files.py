"""Opening text files, compressed or not, with errors that say where they are damaged."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.errors import InputError

_READ_BYTES = 2**20


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file of any number of frames.

    The library's own reader takes a truncated file for a complete one; this one raises EOFError.
    """

    def __init__(self, path: Path):
        import zstandard

        self._file = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._decompressor.decompressobj()
        self._frame_begun = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]  # any writable buffer
        while not self._ready:
            if self._frame.eof:
                packed = self._frame.unused_data
                self._frame = self._decompressor.decompressobj()
                self._frame_begun = False
            else:
                packed = b""
            packed = packed or self._file.read(_READ_BYTES)
            if not packed:
                if self._frame_begun:
                    raise EOFError("the last frame is incomplete")
                return 0
            self._frame_begun = True
            self._ready = self._frame.decompress(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _open_zstd(path: Path) -> BinaryIO:
    return io.BufferedReader(_ZstdReader(path), _READ_BYTES)


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")


_OPENERS: dict[str, Callable[[Path], BinaryIO]] = {
    ".gz": cast(Any, gzip.open),
    ".bz2": cast(Any, bz2.open),
    ".xz": cast(Any, lzma.open),
    ".zst": _open_zstd,
}
COMPRESSIONS = tuple(_OPENERS)


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The decompressed bytes of `path`; the last suffix says how it is compressed.

    InputError where the file cannot be read, or its compressed data are truncated or damaged.
    """
    with reading(path), _OPENERS.get(path.suffix.lower(), _open_plain)(path) as file:
        yield file


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the readers raise on a bad file into an InputError that names it."""
    try:
        yield
    except EOFError as error:
        raise InputError(f"{path}: the compressed data end too early: truncated file?") from error
    except (zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: the compressed data are damaged ({error})") from error
    except OSError as error:
        if error.errno is None:  # gzip and bz2 raise a bare OSError on damaged data
            raise InputError(f"{path}: the compressed data are damaged ({error})") from error
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{path}: cannot be read ({reason})") from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # by name: zstandard is imported only when needed
            raise
        raise InputError(f"{path}: the compressed data are damaged ({error})") from error


def decoded_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line with its end) of UTF-8 text; a byte order mark is dropped."""
    offset = 0
    for number, raw in enumerate(file, start=1):
        yield number, decode(raw, path, offset)
        offset += len(raw)


def decode(raw: bytes, path: Path, offset: int = 0) -> str:
    """`raw`, which begins at byte `offset` of the (decompressed) file, as text."""
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        if offset == 0 and raw.startswith(b"\xef\xbb\xbf"):
            at += 3  # the codec counts from behind the byte order mark
        raise InputError(
            f"{path}: byte {at} (0x{error.object[error.start]:02x}) is not UTF-8; "
            "allowed is UTF-8 text"
        ) from error

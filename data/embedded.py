"""The embedded corpus: documentation and source text of the running Python's standard library.

It needs no download: about 12 MB of English and Python, good enough to see a model learn. Its bytes
depend on the Python version, so two machines compare losses only with the same one.
"""

import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

# `test` is left out because distributions split it off; the others are test fixtures or foreign
# packages.
_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def embedded_name() -> str:
    """Name of the corpus with the Python version that it depends on."""
    return f"embedded corpus of Python {platform.python_version()}"


def embedded_bytes() -> int:
    """Bytes of the source files and topics on disk, to notice that they changed."""
    files = sum(path.stat().st_size for _, path in _source_files())
    return files + sum(len(text.encode()) for text in _topics().values())


def embedded_documents() -> Iterator[tuple[str, str]]:
    """Yield (name, text): the documentation topics, then the source files, each sorted by name."""
    for name, text in sorted(_topics().items()):
        yield f"pydoc_data.topics:{name}", text
    for name, path in _source_files():
        try:
            with tokenize.open(path) as file:  # honours the file's own encoding declaration
                yield name, file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue  # a file with a wrong declaration is not text that anyone could learn from


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave pydoc_data out; the sources are the bulk of it
        return {}
    return topics


def _source_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    named = ((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py"))
    return sorted((name, path) for name, path in named if _is_corpus(name))


def _is_corpus(name: str) -> bool:
    *folders, file = name.split("/")
    if _LEFT_OUT_FOLDERS.intersection(folders):
        return False
    if any(folder.startswith("config-") for folder in folders):  # how this Python was built,
        return False
    if file.startswith("_sysconfigdata"):  # with the paths of the machine that built it
        return False
    return name != "pydoc_data/topics.py"  # its texts come as topics

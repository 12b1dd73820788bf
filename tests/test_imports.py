"""Imports run one way: docs/architecture.md has the arrows."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAY_IMPORT = {
    "kernels": set(),
    "data": set(),
    "model": {"kernels"},
    "training": {"model", "data"},
    "eval": {"model", "data", "training"},
}
# A file beside its configuration when an export carries both away.
RELATIVE = ROOT / "model" / "export" / "hugging_face" / "modeling_lpa.py"
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside of functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path == RELATIVE, f"{path}: relative import"
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path):
    folder = path.relative_to(ROOT).parts[0]
    ours = imported(path) & (set(MAY_IMPORT) | {"train", "tests"})
    allowed = MAY_IMPORT["eval"] if path in COMMAND else MAY_IMPORT[folder]
    assert ours - {folder} <= allowed


def test_nothing_imports_the_commands_of_model():
    for path in set(FILES) - COMMAND:
        text = path.read_text(encoding="utf-8")
        assert "model.delta.command" not in text
        assert "model.export." not in text or path == EXPORT / "__init__.py"


def test_code_that_exports_carry_away_imports_nothing_of_ours():
    for path in (EXPORT / "hugging_face").glob("*.py"):
        assert not imported(path) & set(MAY_IMPORT)


# Commands know our checkpoints, and nothing imports them.
EXPORT = ROOT / "model" / "export"
COMMAND = {path for path in FILES if "model/delta/command/" in path.as_posix()}
COMMAND |= {path for path in FILES if "model/delta/bench/" in path.as_posix()}
COMMAND |= {*EXPORT.glob("*.py")} - {EXPORT / "__init__.py"}
COMMAND.add(ROOT / "model" / "delta" / "__main__.py")
DELTA = [path for path in FILES if "model/delta/" in path.as_posix() and path not in COMMAND]


@pytest.mark.parametrize("path", DELTA, ids=lambda path: str(path.relative_to(ROOT)))
def test_deltas_know_no_backbone_of_ours(path: Path):
    """They work on any nn.Module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "model":
            assert (node.module or "").startswith("model.delta")
    assert not imported(path) & {"kernels", "data", "training", "eval", "transformers", "peft"}


def test_kernels_has_no_version():
    """transformers probes any package of this name for a __version__."""
    import kernels

    assert not hasattr(kernels, "__version__")

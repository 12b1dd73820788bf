"""The Triton kernels on a CPU. The tests are those of interpreted.py; this starts them."""

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def test_in_tritons_interpreter():
    """In a process of its own: Triton reads the variable when it is imported."""
    pytest.importorskip("triton", reason="triton is not installed")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/kernels/interpreted.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    counts = re.search(r"^(\d+) passed", result.stdout.splitlines()[-1])
    assert counts, result.stdout  # none skipped, failed or deselected
    assert int(counts[1]) > 100


def test_without_the_variable_the_cpu_takes_the_reference():
    import torch

    from kernels import dispatch

    assert not dispatch.interpreting()
    answer = dispatch.usable("project", torch.device("cpu"), torch.float32, 64, 64, 64)
    assert answer == (False, "the device is cpu")

"""docs/reliability.md lists exactly the faults that the tests here do."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data.errors import InputError
from tests.conftest import ROOT
from tests.faults import table
from tests.faults.catalogue import FAULTS

HERE = Path(__file__).parent


def test_page_has_the_faults_of_the_tests():
    assert table.faults_of((ROOT / "docs" / "reliability.md").read_text()) == sorted(FAULTS)


def test_every_fault_is_done_by_a_test():
    """An unknown one is refused by Row."""
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    assert set(FAULTS) <= set(re.findall(r'"([a-z0-9-]+)"', tests))


def results(**changes: Any) -> dict[str, Any]:
    row = {
        "launcher": "torchrun", "zero_stage": 1, "saving": "background", "exit_code": 1,
        "rank_exit_code": -9, "status": "running", "seconds_until_gone": 1.04, "steps_lost": 2,
        "message": "",
    }  # fmt: skip
    rows = [row | {"fault": fault} for fault in FAULTS]
    rows.append(row | {"fault": "kill-rank", "zero_stage": 3, "seconds_until_gone": 2.0} | changes)
    return {"date": "D", "hardware": "H", "versions": {"torch": "T"}, "rows": rows}


def test_repetitions_are_one_line_and_nothing_else_of_the_page_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    page, seen = tmp_path / "page.md", tmp_path / "seen.json"
    page.write_text(f"before\n{table.BEGIN}\nstale\n{table.END}\nafter\n")
    seen.write_text(json.dumps(results()))
    monkeypatch.setattr("sys.argv", ["table", str(seen), "--output", str(page)])
    assert table.main() == 0
    text = page.read_text()
    assert table.faults_of(text) == sorted(FAULTS)
    line = next(line for line in text.splitlines() if line.startswith("| `kill-rank`"))
    assert line.endswith("| torchrun; 1, 3; background | 2 | 1 (-9) | 1.0 to 2.0 | 2 |")
    assert text.startswith(f"before\n{table.BEGIN}\nD; 1 session; H; torch T.\n")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "stale" not in text


def test_fault_that_was_not_done_is_named():
    seen = results()
    seen["rows"] = [row for row in seen["rows"] if row["fault"] != "clock-back"]
    with pytest.raises(InputError, match="no result for clock-back"):
        table.table([seen])

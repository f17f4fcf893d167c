"""The record of the sources that the slow tests passed on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import slow_record

SUITE = '<testsuites><testsuite tests="{}" failures="{}" errors="{}" skipped="{}"/></testsuites>'


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tree with one source, one slow test and one that is not."""
    for name, text in {
        "tools/one.py": "1",
        "tests/test_slow.py": "@pytest.mark.slow",
        "tests/test_other.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(slow_record, "ROOT", tmp_path)
    monkeypatch.setattr(slow_record, "RECORD", tmp_path / "tests" / "slow.passed")
    return tmp_path


def report(root: Path, *counts: int) -> str:
    (root / "report.xml").write_text(SUITE.format(*counts))
    return str(root / "report.xml")


def test_a_record_holds_until_a_source_changes(root: Path) -> None:
    assert slow_record.main([]) == 1
    assert slow_record.main([report(root, 3, 0, 0, 0)]) == 0
    assert (root / "tests" / "slow.passed").read_text().endswith(" 3 passed\n")
    assert slow_record.main([]) == 0
    (root / "tests" / "test_other.py").write_text("changed")
    assert slow_record.main([]) == 0
    for name in ("tools/one.py", "tests/test_slow.py", "tools/new.py"):
        (root / name).write_text("# mark.slow changed")
        assert slow_record.main([]) == 1
        slow_record.main([report(root, 3, 0, 0, 0)])


@pytest.mark.parametrize("counts", [(3, 1, 0, 0), (3, 0, 1, 0), (3, 0, 0, 1), (0, 0, 0, 0)])
def test_a_run_that_did_not_pass_whole_is_not_recorded(root: Path, counts: tuple[int, ...]) -> None:
    with pytest.raises(SystemExit, match="not recorded"):
        slow_record.main([report(root, *counts)])
    assert not (root / "tests" / "slow.passed").exists()

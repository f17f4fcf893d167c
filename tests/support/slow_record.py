"""The sources that the slow tests passed on: ``tests/slow.passed`` holds their hash and the cases.

``slow_record.py`` says whether it is the hash of what is here, and ends with 1 if not;
``slow_record.py REPORT`` writes it after a run whose JUnit report is REPORT.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "tests" / "slow.passed"
# What the slow tests run, beside themselves; the pins say on which versions.
PATTERNS = (
    "vllm_vlora/**/*.py",
    "tools/**/*.py",
    "triton_kernels/**/*.py",
    "benchmarks/**/*.py",
    "examples/**/*.py",
    "examples/**/*.json",
    "examples/**/*.safetensors",
    "requirements/**/*.txt",
    "tests/support/*.py",
)


def sources() -> Iterator[Path]:
    """Every file that the slow tests depend on, in no order."""
    for pattern in PATTERNS:
        yield from ROOT.glob(pattern)
    for path in (ROOT / "tests").rglob("test_*.py"):
        if b"mark.slow" in path.read_bytes():
            yield path


def source_hash() -> str:
    """SHA-256 over the names and contents of the sources."""
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(ROOT).as_posix(), path) for path in sources()):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def passed_cases(report: Path) -> int:
    """The cases of a JUnit report; SystemExit when one did not pass, or there is none."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in ElementTree.parse(report).iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    cases = counts.pop("tests")
    if not cases or any(counts.values()):
        raise SystemExit(f"not recorded: of {cases} slow cases {counts}")
    return cases


def main(arguments: list[str]) -> int:
    if arguments:
        RECORD.write_text(f"{source_hash()} {passed_cases(Path(arguments[0]))} passed\n")
        return 0
    if RECORD.exists() and RECORD.read_text().split()[:1] == [source_hash()]:
        return 0
    print(f"{RECORD.relative_to(ROOT)} is of other sources: run `make test-slow`")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The sources that other versions of Triton compiled: ``tests/triton.passed`` holds their hash.

``triton_record.py`` says whether it is the hash of what is here, and ends with 1 if not;
``triton_record.py VERSION ...`` writes it.
"""

from __future__ import annotations

import sys

from compile_kernels import source_hash
from places import TESTS

RECORD = TESTS / "triton.passed"


def main(versions: list[str]) -> int:
    if versions:
        RECORD.write_text(f"{source_hash()} {' '.join(versions)}\n")
        return 0
    if RECORD.exists() and RECORD.read_text().split()[:1] == [source_hash()]:
        return 0
    print(f"{RECORD.name} is of other sources: run `make compat-triton`")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

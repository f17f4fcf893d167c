"""``pytest -p absent``: tests that need an optional package that is not installed are skipped.

For an environment with the wheel and what it requires alone (``make lowest``). In any other a missing
package shall be an error, so this is no conftest.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from importlib.util import find_spec
from typing import Any

import pytest

# What an extra brings, or what tests alone use.
OPTIONAL = (
    *("vllm", "triton", "transformers", "peft", "matplotlib", "ray", "bitsandbytes"),
    *("openai", "tokenizers", "accelerate", "gguf", "build", "setuptools", "prometheus_client"),
)
ABSENT = [name for name in OPTIONAL if find_spec(name) is None]
_SAID = re.compile(rf"No module named '({'|'.join(ABSENT)})[.']")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _skip(report: Any, text: str) -> None:
    found = _SAID.search(text)
    if found and report.outcome == "failed":
        report.outcome, report.longrepr = "skipped", (str(report.nodeid), 0, f"needs {found[1]}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: Any) -> Generator[None, Any, Any]:
    report = yield
    _skip(report, str(report.longrepr))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Generator[None, Any, Any]:
    report = yield
    if call.excinfo is not None:
        # Also what a command or another process printed of it.
        shown = [str(report.longrepr), *map(str, _causes(call.excinfo.value))]
        _skip(report, "\n".join(shown))
    return report

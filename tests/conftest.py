"""What all tests share: their order, reports, and memory that shows when nobody wrote it."""

from __future__ import annotations

import re
import signal
from collections.abc import Generator, Iterator

import engine_logs
import pytest
from hypothesis import settings

# A busy machine may take longer over an example than Hypothesis expects; pytest has a limit anyway.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Started in the background of a script a process ignores Ctrl-C, and so does what it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, longest first: two processes end together only if a long one does not
# come last. The others follow in their usual order.
SLOWEST_FIRST = (
    "test_adding",
    "test_cli",
    "test_direct_compile",
    "test_compression",
    "test_executors",
    "test_kernel_compile",
    "test_direct_kernels",
    "test_training",
    "test_fidelity_options",
    "test_evaluation",
    "test_bench_fit",
    "test_bench_fidelity",
    "test_materialize",
    "test_bench_kernels",
    "test_format2",
    "test_scale",
)
# Kernels and the plugin write into memory that they ask for empty.
POISONED = re.compile("test_(direct|materialize|memory|plugin|slots)(?!_compile)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {stem: place for place, stem in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    engine_logs.begin_test()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        report.sections.extend(engine_logs.sections())
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter,
) -> Generator[None, None, None]:
    """What tests record under "shown" is printed, and behind all else why engines of tests failed."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "shown":
                terminalreporter.write_line(str(value))
    yield
    failed = [*terminalreporter.getreports("failed"), *terminalreporter.getreports("error")]
    for line in engine_logs.summary((report.nodeid, report.sections) for report in failed):
        terminalreporter.write_line(line)


@pytest.fixture(autouse=True, scope="module")
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """``torch.empty`` and the like hold NaN or the largest integer, so that reading them shows."""
    if not POISONED.match(request.path.stem):
        yield
        return
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan(), "PyTorch does not fill memory any more"
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)

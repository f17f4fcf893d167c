"""Times of runs on a device, taken in turns, and what the device can do at best."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from vllm_vlora.timing import percentile, seconds_of, take_turns


@dataclass(frozen=True)
class Method:
    """Something to time.

    Attributes:
        run: does the work ``calls`` times.
        graph: it is a graph's replay, timed on the device alone; otherwise from the call to the end of
            the device's work, so with what the host needs.
    """

    run: Callable[[], object]
    calls: int = 1
    graph: bool = False


@dataclass(frozen=True)
class Rates:
    """What this run measured of the device: bytes a second, and operations a second.

    Attributes:
        copy: within device memory, bytes read plus bytes written.
        read: of a sum over device memory.
        flops: of a large matrix product in 16 bits.
        host: from (pinned) host memory.
    """

    copy: float
    read: float
    flops: float
    host: float

    @property
    def memory(self) -> float:
        """The better of the two memory rates, which makes for the lower floors."""
        return max(self.copy, self.read)


def time_in_turns(
    methods: Sequence[Method], device: torch.device, rounds: int, warmup: int
) -> list[list[float]]:
    """Seconds a call of each method, once a round, one method after the other."""
    clocks = [partial(_time, method, device) for method in methods]
    return take_turns(clocks, rounds, warmup)


def _time(method: Method, device: torch.device) -> float:
    if method.graph:
        return _time_replay(method) / method.calls
    return seconds_of(method.run, partial(synchronise, device)) / method.calls


def _time_replay(method: Method) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Keeps the device busy until the host has enqueued what is timed: a replay on an idle device
    # would begin with a wait of several microseconds for the launch.
    method.run()
    start.record()
    method.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def capture(run: Callable[[], object]) -> Callable[[], None]:
    """A replay of what ``run`` enqueues; it must have run before, so that nothing is compiled now."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def l2_nbytes(device: torch.device) -> int:
    """Bytes of the cache that all of the device shares; 0 where nothing is known of it."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The device's rates, on operands that are far larger than its caches and not zero."""
    large = device.type == "cuda"
    size, side, calls = (1 << 29, 8192, 4) if large else (1 << 24, 256, 1)
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    host = torch.ones(size // 8, pin_memory=large)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    methods = [
        _several(lambda: target.copy_(source), calls),
        _several(lambda: source.sum(), calls),
        _several(lambda: torch.mm(left, right, out=product), calls),
        _several(lambda: target[: len(host)].copy_(host, non_blocking=True), calls),
    ]
    amounts = (2 * source.nbytes, source.nbytes, 2 * side**3, host.nbytes)
    times = time_in_turns(methods, device, rounds=10, warmup=3)
    return Rates(*(amount / percentile(taken, 50) for amount, taken in zip(amounts, times)))


def _several(run: Callable[[], object], calls: int) -> Method:
    def repeated() -> None:
        for _ in range(calls):
            run()

    return Method(repeated, calls)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN, so that reading what nothing wrote shows in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            # Only the filling is wanted; which algorithms are deterministic does not matter here.
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warns)

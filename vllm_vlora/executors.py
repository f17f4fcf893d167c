"""Where the work on single modules runs: in this process, in several, or on a Ray cluster.

Modules are independent of each other, so a pass over a collection is one job a module. A job's
*worker* (a picklable callable that holds what all jobs need) travels once to each process.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

from vllm_vlora.errors import OptionError

EXECUTORS = ("auto", "serial", "processes", "ray")
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Executor:
    """Runs a worker on jobs and yields the results in the order of the jobs.

    Attributes:
        kind: ``serial`` in this process; ``processes`` in ``jobs`` processes of this machine, each
            with its share of the cores; ``ray`` on the cluster that ``RAY_ADDRESS`` names, or on a
            local one that is started and stopped; ``auto`` is processes where there are several cores
            and several jobs.
        jobs: processes, or Ray tasks in flight; 0 for one a core, or all that the cluster has.

    Raises:
        OptionError: an unknown kind, a negative number, or Ray is not installed.
    """

    kind: str = "serial"
    jobs: int = 0

    def __post_init__(self) -> None:
        if self.kind not in EXECUTORS:
            raise OptionError(f"unknown executor {self.kind!r}; use one of {', '.join(EXECUTORS)}")
        if self.jobs < 0:
            raise OptionError(f"jobs must be zero (one a core) or more, got {self.jobs}")

    def run(self, worker: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        """The worker's result for each job, in order; an exception of a job is raised here."""
        count = min(self.jobs or _cores(), len(jobs))
        if self.kind == "ray":
            yield from _run_ray(worker, jobs, self.jobs)
        elif self.kind == "serial" or count < 2:
            yield from map(worker, jobs)
        else:
            yield from _run_processes(worker, jobs, count)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- processes -----------------------------------------------------------------------------------

_worker: Callable[[Any], Any] | None = None


def _start_worker(worker: Callable[[Any], Any], threads: int) -> None:
    import torch

    global _worker
    _worker = worker
    torch.set_num_threads(threads)


def _call_worker(job: Any) -> bytes:
    # Pickled here: the pool's own pickler would share tensors by file descriptors, of which a large
    # collection needs more than a process may open.
    assert _worker is not None
    return pickle.dumps(_worker(job), protocol=pickle.HIGHEST_PROTOCOL)


def _load(future: Future[bytes]) -> Any:
    return pickle.loads(future.result())


def _run_processes(
    worker: Callable[[Job], Result], jobs: Sequence[Job], count: int
) -> Iterator[Result]:
    # Forked children inherit the locks of torch's threads, held or not; spawned ones start clean.
    pool = ProcessPoolExecutor(
        count, get_context("spawn"), _start_worker, (worker, max(1, _cores() // count))
    )
    try:
        yield from _in_flight(jobs, lambda job: pool.submit(_call_worker, job), _load, count)
    finally:
        pool.shutdown(cancel_futures=True)


def _in_flight(
    jobs: Iterable[Job],
    submit: Callable[[Job], Any],
    result: Callable[[Any], Result],
    count: int,
) -> Iterator[Result]:
    """Results in order with few jobs ahead, so that finished ones do not pile up in memory."""
    pending: deque[Any] = deque()
    for job in jobs:
        pending.append(submit(job))
        if len(pending) > 2 * count:
            yield result(pending.popleft())
    while pending:
        yield result(pending.popleft())


# --- Ray -----------------------------------------------------------------------------------------


def _run_ray(worker: Callable[[Job], Result], jobs: Sequence[Job], limit: int) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:
        raise OptionError(
            "executor ray needs Ray: pip install 'vllm-vlora[ray]', or use processes"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(configure_logging=False, include_dashboard=False, log_to_driver=False)
    try:
        shared = ray.put(worker)
        call = ray.remote(_call_ray).options(num_cpus=1)
        count = limit or max(int(ray.cluster_resources().get("CPU", 1)), 1)

        def result(reference: Any) -> Result:
            try:
                return ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                # What the user can mend is reported as in one process.
                raise error.cause from error

        yield from _in_flight(jobs, lambda job: call.remote(shared, job), result, count)
    finally:
        if started:
            ray.shutdown()


def _call_ray(worker: Callable[[Any], Any], job: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    return worker(job)

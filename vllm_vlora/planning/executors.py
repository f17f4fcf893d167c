"""Where the work on single modules runs: in this process, in several, or on a Ray cluster.

Modules are independent of each other, so a pass over a collection is one job a module. A job's
*worker* (a picklable callable that holds what all jobs need) travels once to each process. Torch has
one thread in every job, wherever it runs: sums then have one order, and a result the same bits with
any executor and any number of cores.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from vllm_vlora.errors import OptionError, VLoRAError

EXECUTORS = ("auto", "serial", "processes", "ray")
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Executor:
    """Runs a worker on jobs and yields the results in the order of the jobs.

    Attributes:
        kind: ``serial`` in this process; ``processes`` in ``jobs`` processes of this machine; ``ray``
            on the cluster that ``RAY_ADDRESS`` names, whose nodes have this package and see the same
            folders, or on a local one that is started and stopped; ``auto`` is processes where there
            are several cores and several jobs.
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
        """The worker's result for each job, in order.

        Raises:
            OptionError: Ray is not installed, or its cluster cannot be reached.
            VLoRAError: a process that had jobs died.
            What a job raises, as it was raised there.
        """
        count = min(self.jobs or _cores(), len(jobs))
        if self.kind == "ray" and jobs:
            yield from _run_ray(worker, jobs, self.jobs)
        elif self.kind == "serial" or count < 2:
            yield from _run_here(worker, jobs)
        else:
            yield from _run_processes(worker, jobs, count)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_here(worker: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    for job in jobs:
        with _one_thread():
            result = worker(job)
        yield result


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _in_flight(
    jobs: Iterable[Job],
    submit: Callable[[Job], Any],
    result: Callable[[Any], Result],
    count: int,
    pending: deque[Any],
) -> Iterator[Result]:
    """Results in order with few jobs ahead, so that finished ones do not pile up in memory.

    What was submitted and not yet waited for is in ``pending``, for whoever has to clean up.
    """
    for job in jobs:
        pending.append(submit(job))
        if len(pending) > 2 * count:
            yield result(pending.popleft())
    while pending:
        yield result(pending.popleft())


# --- processes -----------------------------------------------------------------------------------

_worker: Callable[[Any], Any] | None = None


class _Children(SpawnContext):
    """Starts processes and remembers them.

    Forked ones would inherit the locks of torch's threads, held or not; spawned ones start clean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        process = SpawnProcess(*args, **options)
        self.started.append(process)
        return process


def _run_processes(
    worker: Callable[[Job], Result], jobs: Sequence[Job], count: int
) -> Iterator[Result]:
    children = _Children()
    pool = ProcessPoolExecutor(count, children, _start_worker, (worker,))
    pending: deque[Future[bytes]] = deque()
    try:
        yield from _in_flight(
            jobs, lambda job: pool.submit(_call_worker, job), _load, count, pending
        )
    except BrokenProcessPool as error:
        raise VLoRAError(
            "a worker process died, most often because memory ran out: use fewer jobs, or executor "
            "serial (a script that calls this needs `if __name__ == '__main__':` around it)"
        ) from error
    finally:
        # After an error or an interrupt nobody wants what is still running, which may take minutes.
        if pending:
            for process in children.started:
                if process.is_alive():
                    process.terminate()
        pool.shutdown(cancel_futures=True)


def _start_worker(worker: Callable[[Any], Any]) -> None:
    import torch

    global _worker
    _worker = worker
    torch.set_num_threads(1)
    # Ctrl-C goes to all processes of a terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed cannot end its children, and they would wait for jobs for ever.
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _call_worker(job: Any) -> bytes:
    # Pickled here: the pool's own pickler would share tensors by file descriptors, of which a large
    # collection needs more than a process may open.
    assert _worker is not None
    return pickle.dumps(_worker(job), protocol=pickle.HIGHEST_PROTOCOL)


def _load(future: Future[bytes]) -> Any:
    return pickle.loads(future.result())


# --- Ray -----------------------------------------------------------------------------------------


def _run_ray(worker: Callable[[Job], Result], jobs: Sequence[Job], limit: int) -> Iterator[Result]:
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray)
    pending: deque[Any] = deque()
    try:
        # In a list it stays a reference, which each process follows once.
        shared = [ray.put(worker)]
        call = ray.remote(_call_ray).options(num_cpus=1)
        count = limit or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        yield from _in_flight(
            jobs,
            lambda job: call.remote(shared, job),
            lambda reference: pickle.loads(_ray_result(ray, reference)),
            count,
            pending,
        )
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OptionError(
            "executor ray needs Ray: pip install 'vllm-vlora[ray]', or use processes"
        ) from error
    return ray


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS")
    options = {} if address else {"include_dashboard": False}
    try:
        ray.init(address or "local", configure_logging=False, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"reach a Ray cluster at {address!r}" if address else "start a local Ray cluster"
        first = str(error).strip().partition("\n")[0]
        raise OptionError(
            f"cannot {where} ({first}): check RAY_ADDRESS, or use executor processes"
        ) from error


def _ray_result(ray: Any, reference: Any) -> bytes:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if not isinstance(cause, ray.exceptions.RayError):
            # What the user can mend is reported as in one process.
            raise cause from error
        first = str(cause).strip().partition("\n")[0]
        raise VLoRAError(
            f"a Ray task was lost ({type(cause).__name__}: {first}), most often because memory ran "
            "out or a node lacks vllm-vlora: use fewer jobs, or executor processes"
        ) from error


def _call_ray(shared: list[Any], job: Any) -> bytes:
    import ray
    import torch

    torch.set_num_threads(1)
    key = shared[0].hex()
    if key not in _ray_workers:
        _ray_workers.clear()
        _ray_workers[key] = ray.get(shared[0])
    return pickle.dumps(_ray_workers[key](job), protocol=pickle.HIGHEST_PROTOCOL)


_ray_workers: dict[str, Callable[[Any], Any]] = {}

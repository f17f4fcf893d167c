"""Where the work on single modules runs: in this process, in several, or on a Ray cluster.

Modules are independent of each other, so a pass over a collection is one job a module. A job's
*worker* (a picklable callable that holds what all jobs need) travels once to each process. Torch has
one thread in every job, wherever it runs: sums then have one order, and a result the same bits with
any executor and any number of cores.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, parent_process, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_vlora.errors import OptionError, VLoRAError
from vllm_vlora.stopping import check_not_stopped, kept_whole

if TYPE_CHECKING:
    import torch

EXECUTORS = ("auto", "serial", "processes", "ray")
DEVICES = ("auto", "cpu", "cuda")
# What work a process must find for its start, mostly the import of torch, to pay.
_SECONDS_A_PROCESS = 10.0
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass
class Executor:
    """Runs a worker on jobs and yields the results in the order of the jobs.

    As a context manager it keeps its processes from one run to the next: each imports torch, which
    takes seconds. Without, every run has its own.

    Attributes:
        kind: ``serial`` in this process; ``processes`` in ``jobs`` processes of this machine; ``ray``
            on the cluster that ``RAY_ADDRESS`` names, whose nodes have this package and see the same
            folders, or on a local one that is started and stopped; ``auto`` is processes where more
            than one is asked for, and otherwise begins here and goes on in processes once what is left
            is seen to take longer than starting them.
        jobs: processes, or Ray tasks in flight, at most; 0 for one a core, or all that the cluster has.

    Raises:
        OptionError: an unknown kind, a negative number, or Ray is not installed.
    """

    kind: str = "serial"
    jobs: int = 0
    _pool: _Pool | None = field(default=None, init=False, repr=False, compare=False)
    _keeps: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in EXECUTORS:
            raise OptionError(f"unknown executor {self.kind!r}; use one of {', '.join(EXECUTORS)}")
        if self.jobs < 0:
            raise OptionError(f"jobs must be zero (one a core) or more, got {self.jobs}")

    def __enter__(self) -> Executor:
        self._keeps = True
        _keep_freed_memory()
        return self

    def __exit__(self, *error: object) -> None:
        self._keeps = False
        self._close_pool()
        _give_back_memory()

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
        elif self.kind == "auto" and self.jobs < 2:
            yield from self._run_as_pays(worker, jobs, count)
        else:
            yield from self._run_in_processes(worker, jobs, count)

    def _run_as_pays(
        self, worker: Callable[[Job], Result], jobs: Sequence[Job], most: int
    ) -> Iterator[Result]:
        spent = 0.0
        for done, job in enumerate(jobs):
            left = len(jobs) - done
            seconds = spent / done * left if done else 0.0
            count = min(most, left, int(seconds / _SECONDS_A_PROCESS))
            if self._pool is not None:
                count = min(self._pool.count, left)
            if count > 1:
                yield from self._run_in_processes(worker, jobs[done:], count)
                return
            started = time.monotonic()
            result = _call_here(worker, job)
            spent += time.monotonic() - started
            yield result

    def _run_in_processes(
        self, worker: Callable[[Job], Result], jobs: Sequence[Job], count: int
    ) -> Iterator[Result]:
        if self._pool is not None and self._pool.count < count:
            self._close_pool()
        if self._pool is None:
            self._pool = _Pool(count)
        try:
            yield from self._pool.run(worker, jobs)
        except BrokenProcessPool as error:
            raise VLoRAError(
                "a worker process died, most often because memory ran out: use fewer jobs, or executor "
                "serial (a script that calls this needs `if __name__ == '__main__':` around it)"
            ) from error
        finally:
            if not self._keeps or self._pool.pending:
                self._close_pool()

    def _close_pool(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


def check_device(kind: str) -> None:
    """Refuse what ``device_of`` cannot give.

    Raises:
        OptionError: an unknown kind, or ``cuda`` where torch finds no such device.
    """
    import torch

    if kind not in DEVICES:
        raise OptionError(f"unknown device {kind!r}; use one of {', '.join(DEVICES)}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError("device cuda: torch finds no CUDA device here; use auto or cpu")


def device_of(kind: str) -> torch.device:
    """Where the tensors of jobs are worked on; ``auto`` goes by the machine that this runs on."""
    import torch

    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_here(worker: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    for job in jobs:
        yield _call_here(worker, job)


def _call_here(worker: Callable[[Job], Result], job: Job) -> Result:
    check_not_stopped()
    with _one_thread():
        return worker(job)


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Of glibc's mallopt, and the largest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _LARGEST = -1, -3, 1 << 25


def _keep_freed_memory() -> None:
    """Have glibc keep what temporaries free, for the next ones.

    By default it gives a few MiB back to the system at once, and half of the time of measuring goes
    into the zeroed pages that the next temporary gets.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
        libc.mallopt(_TRIM_THRESHOLD, 4 * _LARGEST)


def _give_back_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


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
        check_not_stopped()
        pending.append(submit(job))
        if len(pending) > 2 * count:
            yield result(pending.popleft())
    while pending:
        yield result(pending.popleft())


# --- processes -----------------------------------------------------------------------------------


class _Child(SpawnProcess):
    """Sees from its start neither Ctrl-C nor a hang-up, which all processes of a terminal get.

    The first process ends the others.
    """

    def start(self) -> None:
        # Interrupted between the two, a child that is there waits for what it is to do, and says so.
        with _started_without({signal.SIGINT, signal.SIGHUP}), kept_whole():
            super().start()


@contextmanager
def _started_without(signals: set[signal.Signals]) -> Iterator[None]:
    """Processes that are started within never see these."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Children(SpawnContext):
    """Starts processes and remembers them.

    Forked ones would inherit the locks of torch's threads, held or not; spawned ones start clean.
    """

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []
        # Python's own, which outlives an interrupted run to tidy up after it, lets a hang-up end it.
        with _started_without({signal.SIGHUP}):
            resource_tracker.ensure_running()

    def Process(self, *args: Any, **options: Any) -> SpawnProcess:  # type: ignore[override]
        process = _Child(*args, **options)
        self.started.append(process)
        return process


class _Pool:
    """Processes that run one worker after another; each reads a worker from a file when it first gets a
    job for it, as only a new process could be handed one.

    Attributes:
        count: how many there may be; each starts when there is a job and no idle one.
        pending: what was submitted and not waited for.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.pending: deque[Future[bytes]] = deque()
        self._children = _Children()
        self._processes = ProcessPoolExecutor(count, self._children, _start_process)
        self._workers = TemporaryDirectory(prefix="vllm-vlora-", ignore_cleanup_errors=True)
        self._runs = 0

    def run(self, worker: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        self._runs += 1
        path = Path(self._workers.name) / str(self._runs)
        with path.open("wb") as file:
            pickle.dump(worker, file, protocol=pickle.HIGHEST_PROTOCOL)
        count = min(self.count, len(jobs))
        yield from _in_flight(
            jobs,
            lambda job: self._processes.submit(_call_worker, str(path), job),
            _load,
            count,
            self.pending,
        )
        path.unlink()

    def close(self) -> None:
        """End the processes, at once if they have jobs that nobody waits for."""
        # After an error or an interrupt nobody wants what is still running, which may take minutes.
        if self.pending:
            for process in self._children.started:
                if process.is_alive():
                    process.terminate()
        self._processes.shutdown(cancel_futures=True)
        self._workers.cleanup()


def _start_process() -> None:
    import torch

    torch.set_num_threads(1)
    _keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A parent that is killed cannot end its children, and they would wait for jobs for ever.
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


# The worker that this process had last, and its file.
_worker: tuple[str, Callable[[Any], Any]] | None = None


def _call_worker(path: str, job: Any) -> bytes:
    global _worker
    if _worker is None or _worker[0] != path:
        # Two at once may be more than there is memory for.
        _worker = None
        with open(path, "rb") as file:
            _worker = path, pickle.load(file)
    # Pickled here: the pool's own pickler would share tensors by file descriptors, of which a large
    # collection needs more than a process may open.
    return pickle.dumps(_worker[1](job), protocol=pickle.HIGHEST_PROTOCOL)


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
    _keep_freed_memory()
    key = shared[0].hex()
    if key not in _ray_workers:
        _ray_workers.clear()
        _ray_workers[key] = ray.get(shared[0])
    return pickle.dumps(_ray_workers[key](job), protocol=pickle.HIGHEST_PROTOCOL)


_ray_workers: dict[str, Callable[[Any], Any]] = {}

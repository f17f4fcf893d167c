"""Executors: the same results and errors in this process, in several, and on a Ray cluster."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import executor_jobs
import pytest
import ray
import torch
from executor_jobs import FatalAdapter, Product, dawdle, die, pid_of, refuse

from vllm_vlora.adapters.peft_folder import Adapter, open_adapter, write_adapter
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.errors import AdapterError, OptionError, VLoRAError
from vllm_vlora.planning.executors import Executor

# For other processes: the jobs, and whatever this process was told to import from.
PYTHONPATH = os.pathsep.join(
    filter(None, [str(Path(executor_jobs.__file__).parent), os.environ.get("PYTHONPATH")])
)
# One test a run shows that a cluster works; the others with one take long.
RAY = pytest.param("ray", marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A local cluster that the tests share; its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PYTHONPATH)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(params=["serial", "processes", RAY])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "ray":
        request.getfixturevalue("cluster")
    return Executor(request.param, 2)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Six related adapters of three modules, wide enough for sums that threads would split."""
    folder, generator = tmp_path_factory.mktemp("adapters"), torch.Generator().manual_seed(0)
    shapes = {"l.0.q_proj": (768, 512), "l.0.v_proj": (768, 256), "l.1.q_proj": (768, 512)}
    parents = {
        name: (
            torch.randn(6, d_in, generator=generator),
            torch.randn(d_out, 6, generator=generator),
        )
        for name, (d_in, d_out) in shapes.items()
    }
    found = {}
    for task in range(6):
        factors = {}
        for name, (a, b) in parents.items():
            noise = torch.randn(6, 6, generator=generator)
            a = noise @ a + 0.3 * torch.randn(a.shape, generator=generator)
            factors[name] = (a.bfloat16(), (0.01 * b).bfloat16())
        config = {
            "peft_type": "LORA", "r": 6, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"],
            "base_model_name_or_path": "org/base",
        }  # fmt: skip
        write_adapter(folder / f"task{task}", config, factors)
        found[f"task{task}"] = open_adapter(folder / f"task{task}")
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("executor", ["serial", "processes", "ray"], indirect=True)
def test_results_come_in_order_and_the_worker_travels_once(
    executor: Executor, tmp_path: Path
) -> None:
    worker = Product(tmp_path, torch.randn(64, 512, generator=torch.Generator().manual_seed(1)))
    found = list(executor.run(worker, range(12)))
    assert [seed for seed, _, _ in found] == list(range(12))
    assert {threads for _, threads, _ in found} == {1}
    here = list(Executor("serial").run(worker, range(12)))
    assert all(torch.equal(a[2], b[2]) for a, b in zip(found, here))
    shipments = [path.name.partition("-")[0] for path in tmp_path.iterdir()]
    assert len(shipments) == len(set(shipments)) <= 2
    assert bool(shipments) == (executor.kind != "serial")


def test_serial_gives_the_threads_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for number in Executor("serial").run(lambda _: torch.get_num_threads(), [0, 1]):
            assert number == 1
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_job_s_own_error_is_raised_as_it_is(executor: Executor) -> None:
    with pytest.raises(AdapterError, match=r"^adapter 'x' is damaged; save it again$"):
        list(executor.run(refuse, [0, 1, 3]))
    with pytest.raises(ZeroDivisionError, match="never caught"):
        list(executor.run(refuse, [0, 2, 3]))


@pytest.mark.parametrize("kind", ["processes", RAY])
def test_a_process_that_dies_is_one_clear_error(kind: str, request: pytest.FixtureRequest) -> None:
    if kind == "ray":
        request.getfixturevalue("cluster")
    with pytest.raises(VLoRAError, match=r"memory ran out.*fewer jobs") as caught:
        list(Executor(kind, 2).run(die, [0, 1, 2, 3]))
    assert "\n" not in str(caught.value)
    # The next run starts anew.
    assert list(Executor(kind, 2).run(die, [2, 3])) == [2, 3]


def test_a_compression_whose_process_dies_leaves_nothing(
    adapters: dict[str, Adapter], tmp_path: Path
) -> None:
    fields = {f.name: getattr(adapters["task0"], f.name) for f in dataclasses.fields(Adapter)}
    options = CompressOptions(ratio=4, executor="processes", jobs=2)
    with pytest.raises(VLoRAError, match="a worker process died"):
        compress({**adapters, "fatal": FatalAdapter(**fields)}, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["processes", RAY])
@pytest.mark.parametrize("representation", ["auto", pytest.param("joint", marks=pytest.mark.slow)])
def test_every_executor_writes_the_same_bytes(
    representation: str,
    kind: str,
    adapters: dict[str, Adapter],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if kind == "ray":
        request.getfixturevalue("cluster")
    for executor in ("serial", kind):
        options = CompressOptions(representation, ratio=5, executor=executor, jobs=2)
        compress(adapters, tmp_path / executor, options)
    expected = files(tmp_path / "serial")
    assert any(name.startswith("tasks/") for name in expected)
    assert files(tmp_path / kind) == expected


def test_processes_stay_for_one_run_after_another(tmp_path: Path) -> None:
    matrix = torch.ones(4, 8)
    here = [list(Executor().run(Product(tmp_path, matrix * n), range(6))) for n in range(3)]
    with Executor("processes", 2) as executor:
        for number, expected in enumerate(here):
            found = list(executor.run(Product(tmp_path, matrix * number), range(6)))
            assert all(torch.equal(a[2], b[2]) for a, b in zip(found, expected, strict=True))
        assert {name.partition("-")[0] for name in os.listdir(tmp_path)} <= {
            str(child.pid) for child in multiprocessing.active_children()
        }
    assert not multiprocessing.active_children()
    # Each had each worker once.
    assert len(os.listdir(tmp_path)) <= 2 * 3


def test_after_an_error_the_next_run_has_new_processes() -> None:
    with Executor("processes", 2) as executor:
        with pytest.raises(AdapterError):
            list(executor.run(refuse, [0, 1, 3, 0, 3, 0, 3]))
        assert list(executor.run(refuse, [0, 3, 0])) == [0, 3, 0]
    assert not multiprocessing.active_children()


def test_auto_starts_processes_for_long_work_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_vlora.planning.executors._cores", lambda: 2)
    # As if each job were short, which on a busy machine the first one need not be.
    monkeypatch.setattr("vllm_vlora.planning.executors._SECONDS_A_PROCESS", 1e9)
    with Executor("auto") as executor:
        assert set(executor.run(pid_of, range(20))) == {os.getpid()}
        assert not multiprocessing.active_children()
        # As if each job took so long that a process pays.
        monkeypatch.setattr("vllm_vlora.planning.executors._SECONDS_A_PROCESS", 1e-9)
        found = list(executor.run(pid_of, range(20)))
        assert found[0] == os.getpid()
        assert os.getpid() not in found[1:]
        # They are there now, so that even short work may have them.
        monkeypatch.setattr("vllm_vlora.planning.executors._SECONDS_A_PROCESS", 1e9)
        assert os.getpid() not in list(executor.run(pid_of, range(20)))
    assert list(Executor("auto", 2).run(pid_of, [0, 1])) != [os.getpid()] * 2


def test_what_still_runs_is_ended_when_nobody_wants_it() -> None:
    results = Executor("processes", 2).run(dawdle, range(8))
    assert next(results) == 0
    children = multiprocessing.active_children()
    assert children
    started = time.monotonic()
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 30
    assert not any(child.is_alive() for child in children)


@pytest.mark.parametrize("kind", ["processes", RAY])
def test_ctrl_c_ends_all_processes_without_their_complaints(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import signal
            from executor_jobs import dawdle
            from vllm_vlora.planning.executors import Executor
            if __name__ == "__main__":
                # A run in the background of a shell inherits that the signal is ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                try:
                    for number in Executor("{kind}", 2).run(dawdle, range(8)):
                        print("got", number, flush=True)
                except KeyboardInterrupt:
                    print("interrupted", flush=True)
            """
        )
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = PYTHONPATH
    process = subprocess.Popen(
        [sys.executable, script],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "got 0\n"
    # As a terminal does: to the whole group.
    os.killpg(process.pid, signal.SIGINT)
    output, complaints = process.communicate(timeout=60)
    assert output == "interrupted\n"
    assert process.returncode == 0
    if kind == "processes":
        assert "Traceback" not in complaints
    deadline = time.monotonic() + 30
    while _group_lives(process.pid):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.1)


def test_children_do_not_outlive_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(
            """
            from executor_jobs import dawdle
            from vllm_vlora.planning.executors import Executor
            if __name__ == "__main__":
                for number in Executor("processes", 2).run(dawdle, range(8)):
                    print("got", number, flush=True)
            """
        )
    )
    process = subprocess.Popen(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "got 0\n"
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while _group_lives(process.pid):
        assert time.monotonic() < deadline, "processes were left behind"
        time.sleep(0.1)


def _group_lives(group: int) -> bool:
    """Whether a process of the group runs; those that ended and wait for their parent do not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            return True
    return False


def test_a_script_without_a_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "from executor_jobs import die\n"
        "from vllm_vlora.planning.executors import Executor\n"
        "print(list(Executor('processes', 2).run(die, [2, 3])))\n"
    )
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    found = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.returncode != 0
    assert "needs `if __name__ == '__main__':`" in found.stderr.splitlines()[-1]


def test_a_script_that_compresses_without_a_guard_ends(
    tmp_path: Path, adapters: dict[str, Adapter]
) -> None:
    """Its processes import it and would wait for the lock of the output, which their parent holds."""
    folders = {task: str(adapter.path) for task, adapter in adapters.items()}
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent(f"""
            from vllm_vlora import CompressOptions, compress, open_adapter

            adapters = {{task: open_adapter(path) for task, path in {folders!r}.items()}}
            options = CompressOptions(ratio=3, executor="processes", jobs=2)
            compress(adapters, "checkpoint", options)
        """)
    )
    with subprocess.Popen(
        [sys.executable, script],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            _, stderr = process.communicate(timeout=30)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "needs `if __name__ == '__main__':`" in stderr.splitlines()[-1]
    assert "VLoRAError: this script is imported by a process that it started" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run.py"]


@pytest.mark.slow
def test_a_cluster_that_was_there_stays(cluster: str) -> None:
    assert list(Executor("ray").run(die, [2, 3])) == [2, 3]
    assert ray.is_initialized()


@pytest.mark.slow
def test_ray_address_is_honoured_and_a_local_cluster_ends(cluster: str, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "import os, ray\n"
        "from executor_jobs import die\n"
        "from vllm_vlora.planning.executors import Executor\n"
        "if __name__ == '__main__':\n"
        "    for number in Executor('ray').run(die, [2]):\n"
        "        print(number, ray.get_runtime_context().gcs_address, flush=True)\n"
        "    print(ray.is_initialized())\n"
    )

    def run(**variables: str) -> list[str]:
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"PYTHONPATH": PYTHONPATH, **variables}
        return subprocess.run(
            [sys.executable, script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout.split()

    assert run(RAY_ADDRESS=cluster) == ["2", cluster, "False"]
    number, address, initialized = run()
    assert (number, initialized) == ("2", "False")
    assert address != cluster


@pytest.mark.slow
def test_an_unreachable_cluster_is_an_option_error(tmp_path: Path) -> None:
    code = (
        "from vllm_vlora.planning.executors import Executor\n"
        "from vllm_vlora.errors import OptionError\n"
        "try:\n"
        "    list(Executor('ray').run(len, ['a']))\n"
        "except OptionError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert found.stdout.startswith("cannot reach a Ray cluster at '127.0.0.1:1'")
    assert len(found.stdout.splitlines()) == 1


def test_a_missing_ray_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"pip install 'vllm-vlora\[ray\]'"):
        list(Executor("ray").run(die, [2]))


def test_unknown_executors_and_negative_jobs_are_refused() -> None:
    with pytest.raises(OptionError, match="unknown executor 'threads'"):
        Executor("threads")
    with pytest.raises(OptionError, match="zero"):
        Executor("serial", -1)


def test_no_jobs_start_nothing(executor: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_vlora.planning.executors._connect", None)
    assert list(executor.run(die, [])) == []

"""The scripts in ``examples/`` do what they say, on tiny adapters."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import openai_stand_in
import pytest
from places import ROOT
from synthetic import family, run

from vllm_vlora import Adapter, Checkpoint, open_adapter, validate

EXAMPLES = ROOT / "examples"


def _example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def adapters(tmp_path: Path) -> dict[str, Adapter]:
    return family(tmp_path / "adapters", 4, related=True)


# --- quickstart ----------------------------------------------------------------------------------


def test_quickstart_writes_a_sound_checkpoint_and_takes_a_task_out(
    tmp_path: Path, adapters: dict[str, Adapter], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "ckpt"
    done = _example("quickstart").main(
        [str(tmp_path / "adapters"), "-o", str(output), "--ratio", "1.5"]
    )
    assert done == 0
    assert validate(output) == []
    checkpoint = Checkpoint.open(output)
    assert list(checkpoint.tasks) == list(adapters)
    assert checkpoint.ratio >= 1.5
    worst = max(checkpoint.tasks, key=lambda task: checkpoint.tasks[task].error)
    exported = open_adapter(tmp_path / f"ckpt-{worst}")
    assert list(exported.modules) == list(adapters[worst].modules)
    printed = capsys.readouterr().out
    assert "nothing wrong" in printed
    assert f"{checkpoint.ratio:.1f} times smaller" in printed
    assert f"vllm-vlora serve {output}" in printed


def test_quickstart_reports_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _example("quickstart").main([str(tmp_path), "-o", str(tmp_path / "ckpt")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert not (tmp_path / "ckpt").exists()


# --- serve_and_query -----------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path, adapters: dict[str, Adapter]) -> Path:
    run(adapters, tmp_path / "ckpt", num_components=4)
    return tmp_path / "ckpt"


@contextmanager
def _listening(models: list[str]) -> Iterator[str]:
    with openai_stand_in.make_server(models) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def vllm_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``vllm`` that comes first on the path and starts the stand-in."""
    script = tmp_path / "bin" / "vllm"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {openai_stand_in.__file__} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=":")
    return script


def test_it_starts_a_server_asks_every_task_and_stops_it(
    tmp_path: Path, checkpoint: Path, vllm_command: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = _example("serve_and_query")
    log = tmp_path / "log"
    arguments = ["BASE", str(checkpoint), "hello", "--log", str(log), "--", "--enforce-eager"]
    assert example.main(arguments) == 0
    printed = capsys.readouterr().out
    command, *answers = printed.splitlines()
    assert command.startswith(f"$ vllm-vlora serve --base BASE {checkpoint} ")
    line = (
        f"VLLM_VLORA_CHECKPOINT={checkpoint} vllm serve BASE --enable-lora --max-lora-rank 8 --max-"
    )
    assert line in log.read_text()
    assert answers == [f"task{i}  task{i} says hello" for i in range(4)]
    assert command.endswith("--enforce-eager")
    port = command.split("--port ")[1].split()[0]
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(example.openai.APIConnectionError):
        example.openai.OpenAI(base_url=url, api_key="none", max_retries=0).models.list()


def test_a_server_that_does_not_start_is_reported_with_its_log(
    tmp_path: Path, checkpoint: Path, vllm_command: Path
) -> None:
    vllm_command.write_text("#!/bin/sh\necho no GPU found\nexit 1\n")
    with pytest.raises(SystemExit, match="no GPU found"):
        _example("serve_and_query").main(
            ["BASE", str(checkpoint), "hello", "--log", str(tmp_path / "log")]
        )


def test_it_asks_a_server_that_runs(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = _example("serve_and_query")
    with _listening(["BASE", "task1", "task3"]) as url:
        arguments = ["BASE", str(checkpoint), "hi", "--url", url]
        assert example.main([*arguments, "--task", "task3", "--task", "task1"]) == 0
        assert capsys.readouterr().out == "task3  task3 says hi\ntask1  task1 says hi\n"
        with pytest.raises(SystemExit, match="does not serve task0, task2"):
            example.main(arguments)
        assert example.main([*arguments, "--task", "nobody"]) == 2
    assert "no task 'nobody'" in capsys.readouterr().err

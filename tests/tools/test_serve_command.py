"""``serve`` with a stand-in for vLLM: what it starts, what it passes on, what it refuses."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from typer.testing import CliRunner

from vllm_vlora.adapters.peft_folder import write_adapter
from vllm_vlora.checkpoint.serving import max_loras, serve_command
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.representations.private import encode_private
from vllm_vlora.tools.cli import app

STAND_IN = f"""#!{sys.executable}
import json, os, sys, time
with open(os.environ["SEEN"] + ".new", "w") as file:
    json.dump({{"args": sys.argv[1:], "pid": os.getpid(),
               "checkpoint": os.environ.get("VLLM_VLORA_CHECKPOINT")}}, file)
os.rename(os.environ["SEEN"] + ".new", os.environ["SEEN"])
if "--wait" in sys.argv:
    time.sleep(60)
sys.exit(int(os.environ.get("CODE", 0)))
"""


def write(
    folder: Path,
    base: str | None = "org/base",
    *,
    tasks: int = 3,
    rank: int = 4,
    name: str = "model.layers.0.q_proj",
    extra: dict[str, torch.Tensor] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    writer = CheckpointWriter(folder, base)
    writer.add_module(name, 8, 6)
    stored = encode_private(torch.ones(rank, 8), torch.ones(6, rank), 1.0, "nf4")
    for number in range(tasks):
        writer.add_task(
            f"t{number}",
            {name: stored},
            original_nbytes=1,
            error=0.0,
            adapter_config={},
            extra=extra if number == tasks - 1 else None,
        )
    writer.finish("card")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write(tmp_path / "my tasks; $(x)")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One whose PATH has a stand-in for vLLM first."""
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "SEEN": str(tmp_path / "seen"), "PYTHONPATH": str(ROOT / ".path")}


def command(*args: str | Path) -> list[str]:
    code = "from vllm_vlora.tools.cli import main; main()"
    return [sys.executable, "-c", code, "serve", *map(str, args)]


def start(environment: dict[str, str], *args: str | Path, code: int = 0) -> Any:
    """What the stand-in saw, and what was said."""
    done = subprocess.run(
        command(*args), env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, (done.returncode, done.stderr)
    return json.loads(Path(environment["SEEN"]).read_text()), done


def shown(*args: str | Path) -> list[str]:
    """The words of the line that ``--dry-run`` prints."""
    result = CliRunner().invoke(app, ["serve", *map(str, args), "--dry-run"])
    assert result.exit_code == 0, result.output
    return shlex.split(result.stdout)


def refused(*args: str | Path) -> str:
    result = CliRunner().invoke(app, ["serve", *map(str, args)])
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


OURS = ["--enable-lora", "--max-lora-rank", "8", "--max-loras", "3"]


def test_vllm_takes_the_place_of_the_process(checkpoint: Path, environment: dict[str, str]) -> None:
    rest = ["--port", "8001", "--max-model-len=64", "-tp", "2", "-O3", "--x", "a b", "--verbose"]
    seen, done = start({**environment, "CODE": "7"}, checkpoint, *rest, code=7)
    assert seen["args"] == ["serve", "org/base", *OURS, *rest]
    assert seen["checkpoint"] == str(checkpoint)
    assert done.stdout == ""
    # The line that is shown does the same when it is pasted.
    Path(environment["SEEN"]).unlink()
    pasted = subprocess.run(["bash", "-c", done.stderr], env=environment, timeout=60, check=False)
    assert pasted.returncode == 0
    again = json.loads(Path(environment["SEEN"]).read_text())
    assert (again["args"], again["checkpoint"]) == (seen["args"], seen["checkpoint"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_vllm_itself(
    checkpoint: Path, environment: dict[str, str], number: signal.Signals
) -> None:
    process = subprocess.Popen(
        command(checkpoint, "--wait"),
        env=environment,
        stderr=subprocess.DEVNULL,
        # A shell that runs the tests in the background has them ignore ctrl-c, and so what they start.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    seen = Path(environment["SEEN"])
    deadline = time.monotonic() + 60
    while not seen.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert json.loads(seen.read_text())["pid"] == process.pid
    process.send_signal(number)
    assert process.wait(50) in (-number, 1, 130)  # As Python itself ends on it.


def test_a_relative_folder_is_named_from_the_root(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    assert shown(checkpoint.name)[0] == f"VLLM_VLORA_CHECKPOINT={checkpoint}"


def test_what_is_given_takes_the_place_of_ours(checkpoint: Path) -> None:
    words = shown(checkpoint, "--max_loras", "7", "--max-lora-rank=64")
    assert words[1:] == [
        *("vllm", "serve", "org/base", "--enable-lora", "--max_loras", "7", "--max-lora-rank=64")
    ]


def test_behind_two_dashes_everything_is_vllms(checkpoint: Path) -> None:
    words = shown("--dry-run", checkpoint, "--seed", "1", "--", "--help", "--dry-run", "--", "x")
    # ``shown`` adds a --dry-run, which stands behind the dashes here.
    rest = ["--seed", "1", "--help", "--dry-run", "--", "x", "--dry-run"]
    assert words[1:] == ["vllm", "serve", "org/base", *OURS, *rest]


def test_help_behind_the_checkpoint_is_ours(checkpoint: Path) -> None:
    result = CliRunner().invoke(app, ["serve", str(checkpoint), "--help"])
    assert result.exit_code == 0
    assert "Serve every task of a checkpoint" in result.stdout
    for args in (["--print", str(checkpoint)], [str(checkpoint), "--print"]):
        printed = CliRunner().invoke(app, ["serve", *args])
        assert shlex.split(printed.stdout) == shown(checkpoint)


@pytest.mark.parametrize(
    ("tasks", "mode", "expected"),
    [(1, "auto", 1), (300, "auto", 256), (300, "materialize", 8), (3, "materialize", 3)],
)
def test_max_loras_suit_the_mode(
    tmp_path: Path, tasks: int, mode: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_VLORA_MODE", mode)
    words = shown(write(tmp_path / "ckpt", tasks=tasks))
    assert words[words.index("--max-loras") + 1] == str(expected)
    assert max_loras(tasks, materialize=mode == "materialize") == expected


def test_the_base_model_is_named(tmp_path: Path) -> None:
    nameless = write(tmp_path / "ckpt", None)
    assert "names no base model; give it: --base MODEL" in refused(nameless)
    assert shown("--base", "a model", nameless)[3] == "a model"
    named = write(tmp_path / "named")
    assert shown("--base", "other", named)[3] == "other"
    # Behind the checkpoint too, which is how people write it; up to a "--".
    for given in (("--base", "other"), ("--base=other",)):
        words = shown(named, "--seed", "1", *given, "--port", "8001")
        assert words[3:] == ["other", *OURS, "--seed", "1", "--port", "8001"]
    assert shown(nameless, "--base", "other")[3] == "other"
    assert shown("--dry-run", named, "--", "--base", "other")[-3:-1] == ["--base", "other"]
    assert "--base needs a value" in refused(named, "--base")
    assert "--base is given twice" in refused("--base", "a", named, "--base", "b")
    assert "is no name of a model" in refused(named, "--base", "--port", "8001")


@pytest.mark.parametrize("base", ["--trust-remote-code", "-O3", "", " ", "a\nb", "\x1b[2J"])
def test_a_foreign_base_model_cannot_become_an_option(tmp_path: Path, base: str) -> None:
    foreign = write(tmp_path / "ckpt", base)
    assert "is no name of a model" in refused(foreign)
    line = serve_command(str(foreign), base, 4, 3)
    assert shlex.split(line)[1:4] == ["vllm", "serve", "BASE_MODEL"]


def test_names_are_quoted_for_the_shell(tmp_path: Path) -> None:
    base = "x; touch owned #$(y)`z`'"
    assert shown(write(tmp_path / "ckpt", base))[3] == base


def test_without_vllm_a_line_says_how_to_get_it(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert "no vllm command on PATH; install it with pip install" in refused(checkpoint)
    assert shown(checkpoint)[1] == "vllm"


def test_a_plugin_list_without_ours_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver")
    assert "leaves this plugin out" in refused(checkpoint)
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,vlora")
    assert shown(checkpoint)


def test_lora_is_not_switched_off(checkpoint: Path) -> None:
    assert "--no-enable-lora" in refused(checkpoint, "--no-enable-lora", "--dry-run")


# --- tasks that vLLM cannot serve -----------------------------------------------------------------

HEAD = "base_model.model.lm_head.weight"


@pytest.mark.parametrize("args", [("serve",), ("plan", "--max-loras", "4")])
def test_a_checkpoint_with_which_vllm_would_not_start_is_refused(
    tmp_path: Path, args: tuple[str, ...]
) -> None:
    folder = write(tmp_path / "ckpt", extra={HEAD: torch.ones(5, 8)})
    result = CliRunner().invoke(app, [args[0], str(folder), *args[1:]])
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert f"vLLM cannot serve task 't2': it carries {HEAD}" in line
    assert "vllm-vlora remove CKPT t2 -o COPY" in line


def test_info_says_what_cannot_be_served_and_shows_extra_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path / "ckpt", extra={HEAD: torch.ones(500, 8)})
    data = json.loads(CliRunner().invoke(app, ["info", str(folder), "--json"]).stdout)
    assert list(data["not_served"]) == ["t2"]
    assert data["extra_bytes"] == 16_000
    text = CliRunner().invoke(app, ["info", str(folder)]).stdout
    assert "vLLM cannot serve t2" in text
    # No line that does not start is given beside it.
    assert "vllm serve" not in text
    assert "vllm-vlora serve" not in text
    assert "t2 -o COPY" in text
    assert "16.0 kB of heads and other extra tensors" in text


@pytest.mark.parametrize("json_too", [False, True])
def test_add_says_that_vllm_will_not_start_any_more(tmp_path: Path, json_too: bool) -> None:
    folder, adapter = write(tmp_path / "ckpt"), tmp_path / "headed"
    name = "model.layers.0.q_proj"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    config |= {"base_model_name_or_path": "org/base", "modules_to_save": ["lm_head"]}
    factors = {name: (torch.ones(2, 8), torch.ones(6, 2))}
    write_adapter(adapter, config, factors, extra={HEAD: torch.ones(5, 8)})
    result = CliRunner().invoke(
        app, ["add", str(folder), str(adapter), "--ratio", "0.1", *["--json"] * json_too]
    )
    assert result.exit_code == 0, result.output
    if json_too:
        assert list(json.loads(result.stdout)["not_served"]) == ["headed"]
    else:
        assert f"vLLM cannot serve headed: it carries {HEAD}" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize("name", ["score", "classifier"])
def test_classification_heads_may_be_served(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "ckpt", extra={f"base_model.model.{name}.weight": torch.ones(2, 8)})
    assert (
        json.loads(CliRunner().invoke(app, ["info", str(folder), "--json"]).stdout)["not_served"]
        == {}
    )
    assert shown(folder)


def test_a_rank_above_vllms_is_served_direct_or_not_at_all(tmp_path: Path) -> None:
    direct = write(tmp_path / "direct", rank=600)
    assert shown(direct)[-4:] == ["--max-lora-rank", "512", "--max-loras", "3"]
    head = write(tmp_path / "head", rank=600, name="lm_head")
    line = refused(head)
    assert "it has rank 600, above vLLM's largest (512), and cannot run direct" in line

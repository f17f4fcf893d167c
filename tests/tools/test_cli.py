"""The command line: what it does, what it says, and its exit codes (0 done, 1 check, 2 input)."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from places import DATA
from plugin_world import build
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vllm_vlora import __version__
from vllm_vlora.adapters.peft_folder import open_adapter, write_adapter
from vllm_vlora.checkpoint.card import format_bytes
from vllm_vlora.checkpoint.manifest import CONFIG_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.serving import serving_rank
from vllm_vlora.compression.options import DEFAULT_LOSS
from vllm_vlora.errors import OptionError
from vllm_vlora.plugin.memory import plan_memory
from vllm_vlora.task_ids import encode_task_id
from vllm_vlora.tools.cli import app
from vllm_vlora.tools.common_options import parse_size
from vllm_vlora.tools.summary import print_curve, print_tasks, summarize
from vllm_vlora.tools.terminal import open_console

FORMAT2 = DATA / "format2"
runner = CliRunner()


def invoke(*args: str | Path, code: int = 0) -> Any:
    result = runner.invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    assert "Traceback" not in result.output
    return result


def error_line(*args: str | Path, code: int = 2) -> str:
    """The one line that a failing call says on stderr; it prints nothing on stdout."""
    result = invoke(*args, code=code)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    return errors[0]


def usage_error(*args: str | Path) -> str:
    """What is said of a call that the parser refuses: in one line, behind how it is to be."""
    result = invoke(*args, code=2)
    assert result.stdout == ""
    assert result.stderr.startswith("Usage: ")
    return str(result.stderr.splitlines()[-1])


def make_adapter(
    folder: Path, *, rank: int = 4, seed: int = 0, size: int = 96, layers: int = 1, **config: Any
) -> Path:
    generator = torch.Generator().manual_seed(seed)
    names = [
        f"model.layers.{layer}.self_attn.{leaf}"
        for layer in range(layers)
        for leaf in ("q_proj", "v_proj")
    ]
    factors = {
        name: (
            torch.randn(rank, size, generator=generator).bfloat16(),
            torch.randn(size, rank, generator=generator).bfloat16(),
        )
        for name in names
    }
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "org/base",
    }
    return write_adapter(folder, settings | config, factors)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for seed, name in enumerate(("sql", "chat", "Zürich 東京")):
        make_adapter(folder / name, rank=4 + seed, seed=seed)
    return folder


def test_compress_tells_of_the_worst_of_many_tasks_and_info_of_all(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_vlora.tools.compress_command._SHOWN_TASKS", 1)
    output = tmp_path / "ckpt"
    shown = invoke("compress", *adapters.iterdir(), "-o", output, "--ratio", "3").stdout
    (worst, *others) = sorted(
        Checkpoint.open(output).tasks.items(), key=lambda pair: -pair[1].error
    )
    assert worst[1].error > others[0][1].error
    assert f"│ {worst[0]} " in shown
    assert all(f"│ {name} " not in shown for name, _ in others)
    assert "and 2 more: vllm-vlora info" in shown
    listed = invoke("info", output).stdout
    assert all(f"│ {name} " in listed for name in ("sql", "chat", "Zürich 東京"))
    assert "and 2 more" not in listed


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that tests only read: awkward task ids, one task kept exactly."""
    root = tmp_path_factory.mktemp("shared")
    names = []
    for seed, task_id in enumerate(("../../etc/x", "a/b", "a_b", "Ünïcode [red]")):
        folder = make_adapter(root / f"adapter{seed}", rank=4, seed=seed)
        names += ["--name", f"{task_id}={folder}"]
    invoke("compress", *names, "-o", root / "ckpt", "--max-error", "0")
    return root / "ckpt"


def same_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- help and version ----------------------------------------------------------------------------


def test_version() -> None:
    assert invoke("--version").stdout == f"vllm-vlora {__version__}\n"


def _commands(group: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Every command with the words that call it, also of groups."""
    yield path, group
    for name, one in getattr(group, "commands", {}).items():
        yield from _commands(one, (*path, name))


CALLS = dict(_commands(typer.main.get_command(app)))
# Older versions of typer refuse values in their own words, which name the value too.
in_our_words = pytest.mark.skipif(
    not hasattr(CALLS["info",].params[0], "type_descriptor"), reason="pydantic checks no values"
)


@pytest.mark.parametrize("width", [20, 40, 80, 120])
@pytest.mark.parametrize("call", CALLS, ids=" ".join)
def test_help_says_all_and_teaches_by_example(
    monkeypatch: pytest.MonkeyPatch, call: tuple[str, ...], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = invoke(*call, "--help").stdout
    assert "…" not in text
    assert "[bold]" not in text
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width
    words = set(text.replace(",", " ").split())
    for param in CALLS[call].params:
        assert words >= {*param.opts, *param.secondary_opts} or param.metavar in text
        assert not param.envvar or f"{param.envvar}]" in words
    for name, one in getattr(CALLS[call], "commands", {}).items():
        assert name in words
        assert " ".join(one.help.split("\n\n")[0].split()) in " ".join(text.split())
    if call != ("router",):
        examples = text.partition("Example")[2].splitlines()
        assert any(line.strip().startswith(" ".join(("vllm-vlora", *call))) for line in examples)


def test_help_states_the_default_quality() -> None:
    text = " ".join(invoke("compress", "--help").stdout.split())
    assert (
        f"predicted loss of {DEFAULT_LOSS:.0%} of every adapter's gain".replace("%", " %") in text
    )


def test_help_is_quick_since_it_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from vllm_vlora.tools.cli import app; "
        "assert CliRunner().invoke(app, ['compress', '--help']).exit_code == 0; "
        "assert not {'torch', 'vllm', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- compress ------------------------------------------------------------------------------------


def test_compress_a_folder_of_adapters(adapters: Path, tmp_path: Path) -> None:
    (adapters / "notes").mkdir()
    (adapters / "README.md").write_text("not an adapter")
    result = invoke("compress", adapters, "-o", tmp_path / "ckpt", "--ratio", "2")
    assert f"{adapters} is a folder of adapters: 3 found" in result.stderr
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert set(checkpoint.tasks) == {"sql", "chat", "Zürich 東京"}
    assert checkpoint.ratio >= 2
    assert checkpoint.base_model == "org/base"
    for task_id in checkpoint.tasks:
        assert task_id in result.stdout
        assert f"{checkpoint.record(task_id).error:.4f}" in result.stdout
    assert "vllm serve org/base --enable-lora --max-lora-rank 8" in result.stdout
    assert "chosen" in result.stdout
    card = (tmp_path / "ckpt" / "README.md").read_text()
    assert 'base_model: "org/base"' in card
    assert "Zürich 東京" in card
    assert "proxy" in card


def test_compress_json_is_all_that_stands_on_stdout(adapters: Path, tmp_path: Path) -> None:
    result = invoke("compress", adapters, "-o", tmp_path / "ckpt", "--json", "--ratio", "2")
    data = json.loads(result.stdout)
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert data["bytes"] == checkpoint.nbytes
    assert data["ratio"] == pytest.approx(checkpoint.ratio)
    assert {task["task"]: task["error"] for task in data["tasks"]} == {
        task_id: record.error for task_id, record in checkpoint.tasks.items()
    }
    assert {"private", "joint"} <= {c["representation"] for c in data["candidates"]}
    assert data["seconds"] > 0


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        (["--representation", "private", "--quantize", "int8"], "private int8"),
        (["--representation", "private", "--quantize", "none", "--ratio", "1"], "private bfloat16"),
        (["--num-components", "6", "--dtype", "float32"], "joint float32"),
    ],
)
def test_options_reach_the_library(
    adapters: Path, tmp_path: Path, options: list[str], stored: str
) -> None:
    if "int8" in options:
        options = [*options, "--ratio", "1.5"]
    result = invoke("compress", adapters, "-o", tmp_path / "ckpt", "--json", *options)
    for task in json.loads(result.stdout)["tasks"]:
        assert list(task["stored_as"]) == [stored]


def test_names_rename_and_add(adapters: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "run" / "sql", seed=9)
    third = make_adapter(tmp_path / "third", seed=10)
    message = error_line("compress", adapters, other, "-o", tmp_path / "ckpt")
    assert "'sql'" in message
    assert f"--name NEW_ID={other}" in message
    renamed = f"{tmp_path}/adapters/../run/sql/"
    invoke(
        *("compress", adapters, other, "-o", tmp_path / "ckpt", "--max-error", "0"),
        *("--name", f"org/sql={renamed}", "--name", f"more={third}"),
    )
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    assert set(checkpoint.tasks) == {"sql", "chat", "Zürich 東京", "org/sql", "more"}
    invoke("export", tmp_path / "ckpt", "org/sql", "-o", tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    got, want = open_adapter(tmp_path / "out").factors(name), open_adapter(other).factors(name)
    assert torch.equal(got[0], want[0])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "no adapter given"),
        ([""], "an adapter's name is empty"),
        (["nowhere/at/all"], "nowhere/at/all"),
        (["{sql}", "{sql}/"], "given twice"),
        (["--name", "sql"], "ID=PATH"),
        (["--name", "={sql}"], "ID=PATH"),
        (["--name", "x" * 300 + "={sql}"], "300 characters"),
        (["--name", "a\nb={sql}"], "U+000A"),
        (["--name", "x={sql}", "--name", "x={chat}"], "'x'"),
        (["{sql}", "--ratio", "2", "--max-error", "0.1"], "contradict"),
        (["{sql}", "--ratio", "0"], "ratio"),
        (["{sql}", "--ratio", "nan"], "ratio"),
        (["{sql}", "--max-error", "-1"], "max_error"),
        (["{sql}", "--num-components", "0"], "num_components"),
        (["{sql}", "--gate", "0.1"], "give it with a ratio above 1 or max_bytes"),
        (["{sql}", "--ratio", "1", "--gate", "0.1"], "give it with a ratio above 1 or max_bytes"),
        (["{sql}", "--max-error", "0.1", "--data", "sql=text"], "leave out --data, or --max-error"),
    ],
)
def test_wrong_calls_say_what_is_wrong(
    adapters: Path, tmp_path: Path, args: list[str], words: str
) -> None:
    filled = [arg.format(sql=adapters / "sql", chat=adapters / "chat") for arg in args]
    assert words in error_line("compress", *filled, "-o", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_calls_that_the_parser_refuses(adapters: Path) -> None:
    assert "--output" in usage_error("compress", adapters)
    assert "curved" in usage_error("compress", adapters, "-o", "x", "--representation", "curved")
    assert "nonsense" in usage_error("nonsense")
    assert "--all" in usage_error("export", "ckpt", "-o", "x")
    assert "--all" in usage_error("export", "ckpt", "task", "--all", "-o", "x")


@in_our_words
@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("compress a -o b --ratio x", "'--ratio': 'x' is not a number"),
        ("compress a -o b --jobs 1.5", "'--jobs': '1.5' is not a whole number"),
        (
            "compress a -o b --quantize \x1b[31m",
            "'--quantize': '\\x1b[31m' is not one of auto, none, int8, nf4",
        ),
        ("plan c --max-loras x", "'--max-loras': 'x' is not a whole number"),
        ("plan c --max-loras 1 --memory -1", "'--memory': '-1' is not a number of at least 0"),
        ("analyze a --threshold 7", "'--threshold': '7' is not a number from -1 to 1"),
        ("router train c --data d --fail-under 2", "'2' is not a number from 0 to 1"),
    ],
)
def test_values_are_refused_in_words_of_options(call: str, said: str) -> None:
    line = usage_error(*call.split(" "))
    assert line.startswith("Error: Invalid value for ")
    assert line.removesuffix(".").endswith(said)


@in_our_words
def test_a_variable_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_VLORA_DEBUG", "banana")
    line = usage_error("info", "x")
    assert "VLLM_VLORA_DEBUG" in line
    assert line.endswith("'banana' is not one of 1, 0, true, false")


def test_adapters_that_cannot_be_compressed_are_refused_by_name(
    adapters: Path, tmp_path: Path
) -> None:
    dora = make_adapter(tmp_path / "dora")
    edit_config(dora, use_dora=True)
    assert "DoRA" in error_line("compress", adapters, dora, "-o", tmp_path / "ckpt")
    loha = make_adapter(tmp_path / "loha")
    edit_config(loha, peft_type="LOHA")
    assert "LOHA" in error_line("compress", loha, "-o", tmp_path / "ckpt")
    cut = make_adapter(tmp_path / "cut")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert str(cut) in error_line("compress", cut, "-o", tmp_path / "ckpt")
    nan = make_adapter(tmp_path / "nan")
    data = bytearray((nan / "adapter_model.safetensors").read_bytes())
    data[-2:] = b"\xc0\x7f"
    (nan / "adapter_model.safetensors").write_bytes(data)
    assert str(nan) in error_line("compress", adapters, nan, "-o", tmp_path / "ckpt")
    other = make_adapter(tmp_path / "other", size=64)
    assert "64 x 64" in error_line("compress", adapters, other, "-o", tmp_path / "ckpt")
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in error_line(
        "compress", tmp_path / "empty", "-o", tmp_path / "ckpt"
    )
    assert not (tmp_path / "ckpt").exists()


def test_a_budget_that_cannot_be_met_is_a_failed_check(adapters: Path, tmp_path: Path) -> None:
    message = error_line("compress", adapters, "-o", tmp_path / "ckpt", "--ratio", "1e6", code=1)
    assert "ratio" in message
    assert not (tmp_path / "ckpt").exists()


def test_a_folder_whose_name_is_no_id_is_given_one(adapters: Path, tmp_path: Path) -> None:
    odd = make_adapter(adapters / "new\nline")
    assert "give the adapter an id with --name ID=" in error_line(
        "compress", adapters, "-o", tmp_path / "ckpt"
    )
    invoke("compress", adapters, "--name", f"plain={odd}", "-o", tmp_path / "ck\npt", "--no-judge")
    assert "plain" in Checkpoint.open(tmp_path / "ck\npt").tasks


def test_an_existing_output_is_replaced_only_with_force_and_only_if_ours(
    adapters: Path, tmp_path: Path
) -> None:
    output = tmp_path / "ckpt"
    invoke("compress", adapters / "sql", "-o", output)
    before = same_files(output)
    assert "exists" in error_line("compress", adapters / "chat", "-o", output)
    assert same_files(output) == before
    invoke("compress", adapters / "chat", "-o", output, "--force")
    assert set(Checkpoint.open(output).tasks) == {"chat"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert str(tmp_path / "mine") in error_line(
        "compress", adapters, "-o", tmp_path / "mine", "--force"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_the_card_is_one_the_hub_reads(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", base_model_name_or_path="org/base: #1|x")
    invoke("compress", "--name", f"a|b *c* ~d~={adapter}", "-o", tmp_path / "local")
    card = ModelCard.load(tmp_path / "local" / "README.md")
    assert card.data.library_name == "vllm-vlora"
    assert card.data.tags == ["lora", "vllm", "peft"]
    # A path or the like in this field makes the Hub refuse the upload.
    assert card.data.base_model is None
    rows = [line for line in card.text.splitlines() if line.startswith(r"| a\|b \*c\* \~d\~ |")]
    assert len(rows) == 1
    invoke("compress", make_adapter(tmp_path / "b"), "-o", tmp_path / "hub")
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.base_model == "org/base"
    assert "vllm serve org/base --enable-lora --max-lora-rank 8" in card.text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9_994, "9.99 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_have_three_digits(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_a_rank_that_vllm_cannot_hold_is_said(tmp_path: Path) -> None:
    assert [serving_rank(rank) for rank in (1, 2, 8, 9, 320, 321, 512, 513)] == [
        *(1, 8, 8, 16, 320, 512, 512, None)
    ]
    adapter = make_adapter(tmp_path / "a", rank=600, size=600)
    output = tmp_path / "ckpt"
    result = invoke("compress", adapter, "-o", output, "--max-error", "0")
    assert "up to 512" in result.stdout
    assert json.loads(invoke("info", output, "--json").stdout)["max_lora_rank"] is None


def test_different_base_models_are_a_warning(tmp_path: Path) -> None:
    one = make_adapter(tmp_path / "one")
    two = make_adapter(tmp_path / "two", base_model_name_or_path="/models/copy")
    result = invoke("compress", one, two, "-o", tmp_path / "ckpt")
    assert "Warning: " in result.stderr
    assert "/models/copy" in result.stderr


def test_verbose_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = runner.invoke(app, ["info", str(tmp_path), "--verbose"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    monkeypatch.setenv("VLLM_VLORA_DEBUG", "1")
    assert "Traceback" in runner.invoke(app, ["info", str(tmp_path)]).stderr


# --- info, validate, export ----------------------------------------------------------------------


def test_info_says_what_is_there_and_how_to_serve_it(shared: Path) -> None:
    text = invoke("info", shared).stdout
    for words in ("../../etc/x", "a/b", "a_b", "Ünïcode [red]", "q_proj", "96 x 96", "org/base"):
        assert words in text
    assert (
        f"VLLM_VLORA_CHECKPOINT={shared} vllm serve org/base --enable-lora --max-lora-rank 8 "
        "--max-loras 4\n" in text
    )


def test_info_json(shared: Path) -> None:
    data = json.loads(invoke("info", shared, "--json").stdout)
    checkpoint = Checkpoint.open(shared)
    assert [task["task"] for task in data["tasks"]] == list(checkpoint.tasks)
    assert [task["digest"] for task in data["tasks"]] == [
        checkpoint.digest(task_id) for task_id in checkpoint.tasks
    ]
    assert (data["max_rank"], data["max_lora_rank"]) == (4, 8)
    assert (data["base_model"], data["format_version"]) == ("org/base", 1)
    assert sum(task["bytes"] for task in data["tasks"]) + data["basis_bytes"] == data["bytes"]


def test_info_and_validate_of_what_is_no_checkpoint(tmp_path: Path) -> None:
    for command in ("info", "validate"):
        assert "not a vllm-vlora checkpoint" in error_line(command, tmp_path)
        assert "no such folder" in error_line(command, tmp_path / "nowhere")


def test_validate_reports_soundness_and_damage(adapters: Path, tmp_path: Path) -> None:
    output = tmp_path / "ckpt"
    invoke("compress", adapters, "-o", output)
    assert "sound" in invoke("validate", output).stdout
    assert json.loads(invoke("validate", output, "--json").stdout) == {
        "checkpoint": str(output),
        "sound": True,
        "content": f"sha256:{Checkpoint.open(output).content_digest}",
        "problems": [],
    }
    for task in ("sql", "chat"):
        path = output / "tasks" / f"{task}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    text = invoke("validate", output, code=1).stdout
    assert "sql.safetensors" in text
    assert "chat.safetensors" in text
    assert "2 problems" in text
    data = json.loads(invoke("validate", output, "--json", code=1).stdout)
    assert (data["sound"], len(data["problems"])) == (False, 2)
    (output / CONFIG_FILE).write_text('{"format_version": 99}')
    assert "upgrade" in error_line("validate", output)


def test_export_one_task_several_and_all(shared: Path, tmp_path: Path) -> None:
    invoke("export", shared, "a/b", "-o", tmp_path / "one")
    original = load_file(shared.parent / "adapter1" / "adapter_model.safetensors")
    exported = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)
    result = invoke("export", shared, "a/b", "a_b", "a/b", "-o", tmp_path / "two")
    assert len(result.stdout.splitlines()) == 2
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"a~2fb", "a_b"}
    invoke("export", shared, "--all", "-o", tmp_path / "all")
    tasks = Checkpoint.open(shared).tasks
    assert {p.name for p in (tmp_path / "all").iterdir()} == set(map(encode_task_id, tasks))
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two", "all"}


def test_export_writes_the_config_that_is_asked_for(shared: Path, tmp_path: Path) -> None:
    options = ("--alpha", "32", "--base-model", "org/other", "--target-modules", "q_proj,v_proj")
    result = invoke("export", shared, "a/b", "-o", tmp_path / "out", *options, "--json")
    assert json.loads(result.stdout) == {"a/b": str(tmp_path / "out")}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["base_model_name_or_path"]) == (32, "org/other")
    assert config["target_modules"] == ["q_proj", "v_proj"]
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    original = load_file(shared.parent / "adapter1" / "adapter_model.safetensors")
    for name in original:
        if "lora_B" in name:
            other = name.replace("lora_B", "lora_A")
            got = 32 / 4 * exported[name].float() @ exported[other].float()
            wanted = 8 / 4 * original[name].float() @ original[other].float()
            torch.testing.assert_close(got, wanted)
    refused = error_line(
        "export", shared, "a/b", "-o", tmp_path / "x", "--target-modules", "v_proj"
    )
    assert "q_proj" in refused


def test_export_refuses_what_it_cannot_do(shared: Path, tmp_path: Path) -> None:
    assert "'nope'" in error_line("export", shared, "nope", "-o", tmp_path / "out")
    assert "'nope'" in error_line("export", shared, "a/b", "nope", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    invoke("export", shared, "a/b", "-o", tmp_path / "out")
    before = same_files(tmp_path / "out")
    assert "exists" in error_line("export", shared, "a_b", "-o", tmp_path / "out")
    assert same_files(tmp_path / "out") == before
    invoke("export", shared, "a_b", "-o", tmp_path / "out", "--force")
    assert same_files(tmp_path / "out") != before


# --- plan ----------------------------------------------------------------------------------------


def test_plan_json_is_what_the_library_counts(shared: Path) -> None:
    options = ("--max-loras", "6", "--tp", "2", "--dtype", "fp16", "--memory", "0.5")
    data = json.loads(invoke("plan", shared, *options, "--gpu-memory", "80", "--json").stdout)
    found = plan_memory(Checkpoint.open(shared), max_loras=6, tp=2, dtype="float16", memory=1 << 29)
    assert set(data) == {
        *("checkpoint", "tasks", "tp", "dtype", "max_loras", "max_lora_rank", "layers_from"),
        *("slices", "gpu_bytes", "modes", "not_direct", "assumptions"),
    }
    assert (data["tp"], data["dtype"], data["tasks"]) == (2, "float16", 4)
    assert (data["max_loras"], data["max_lora_rank"], data["gpu_bytes"]) == (6, 8, 80 << 30)
    assert [mode["mode"] for mode in data["modes"]] == ["stock", "materialize", "direct", "auto"]
    for mode, expected in zip(data["modes"], found.modes):
        sizes = mode["bytes"]
        assert sizes["total"] == sum(v for k, v in sizes.items() if k != "total")
        assert sizes["total"] == expected.total_nbytes > 0
        assert sizes["slots"] == expected.slots_nbytes
        assert mode["fits"]["batch_tasks"] == 4
    assert data["modes"][1]["bytes"]["slots"] == 6 * 8 * 2 * 2 * (96 + 48)
    assert data["assumptions"] == found.assumptions


def test_plan_shows_a_table_that_is_not_cut(shared: Path, tmp_path: Path) -> None:
    result = call("plan", shared, "--max-loras", "200", "--memory", "1", "--gpu-memory", "80")
    assert (result.returncode, result.stderr) == (0, "")
    for words in ("stock vLLM", "materialize", "direct", "auto", "200 x 8", "8 x 8", "Total"):
        assert words in result.stdout
    assert "Fit: resident tasks" in result.stdout
    assert "the checkpoint's modules alone" in result.stdout
    assert "…" not in result.stdout
    assert_plain([result.stdout])
    config = {
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = invoke("plan", shared, "--max-loras", "2", "--model", tmp_path).stdout
    assert f"9 layer slices of {tmp_path}/config.json" in text
    assert "Note:" not in text
    narrowed = invoke(
        *("plan", shared, "--max-loras", "2", "--model", tmp_path),
        *("--lora-target-modules", "qkv_proj"),
    )
    assert "3 layer slices" in narrowed.stdout


def test_plan_counts_narrow_rows_as_the_library_does(tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "ckpt", private="narrow")
    assert checkpoint.has_narrow_rows(checkpoint.tasks)
    totals = []
    for options in ([], ["--narrow-rows"]):
        data = json.loads(
            invoke("plan", tmp_path / "ckpt", "--max-loras", "4", *options, "--json").stdout
        )
        found = plan_memory(checkpoint, max_loras=4, narrow_rows=bool(options)).mode("direct")
        totals.append(data["modes"][2]["bytes"]["total"])
        assert totals[-1] == found.total_nbytes
    assert totals[1] < totals[0]


def test_plan_says_which_tasks_cannot_run_direct(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "head")
    weights = load_file(adapter / "adapter_model.safetensors")
    renamed = {
        name.replace("model.layers.0.self_attn.v_proj", "lm_head"): tensor
        for name, tensor in weights.items()
    }
    save_file(renamed, adapter / "adapter_model.safetensors")
    edit_config(adapter, target_modules=["q_proj", "lm_head"])
    plain = make_adapter(tmp_path / "plain")
    invoke("compress", adapter, plain, "-o", tmp_path / "ckpt")
    result = invoke("plan", tmp_path / "ckpt", "--max-loras", "4")
    assert "1 of 2 tasks, module lm_head is the output head: head" in result.stdout
    assert "Cannot run direct: task 'head' cannot run direct" in result.stdout
    data = json.loads(invoke("plan", tmp_path / "ckpt", "--max-loras", "4", "--json").stdout)
    assert data["not_direct"] == {"head": "module lm_head is the output head"}
    direct = data["modes"][2]
    assert (direct["bytes"]["total"], direct["fits"]) == (0, None)
    assert "lm_head" in direct["obstacle"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-loras", "0"], "max_loras"),
        (["--max-loras", "2", "--tp", "5"], "does not divide"),
        (["--max-loras", "2", "--max-lora-rank", "5"], "1, 8, 16"),
        (["--max-loras", "2", "--dtype", "int8"], "int8"),
        (["--max-loras", "2", "--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--max-loras", "2", "--lora-target-modules", "x_proj"], "'x_proj'"),
    ],
)
def test_plan_refuses_in_one_line(shared: Path, options: list[str], words: str) -> None:
    assert words in error_line("plan", shared, *options)


def test_plan_needs_max_loras(shared: Path) -> None:
    assert "--max-loras" in usage_error("plan", shared)


# --- as a program --------------------------------------------------------------------------------


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "vllm_vlora.tools", *map(str, args)]


def call(*args: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*args),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        check=False,
    )


def assert_plain(texts: Iterable[str]) -> None:
    for text in texts:
        assert "\x1b" not in text
        assert "\r" not in text


def test_a_pipe_gets_whole_lines_without_control_codes(shared: Path, tmp_path: Path) -> None:
    result = call("info", shared)
    assert (result.returncode, result.stderr) == (0, "")
    assert "Ünïcode [red]" in result.stdout
    assert "…" not in result.stdout
    wrong = call("info", tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert len(wrong.stderr.splitlines()) == 1
    assert_plain([result.stdout, result.stderr, wrong.stderr])


def test_a_narrow_terminal_gets_every_column(shared: Path) -> None:
    summary = summarize(Checkpoint.open(shared), str(shared))
    console = open_console()
    console.width = 20
    with console.capture() as shown:
        print_tasks(console, summary)
    text = shown.get()
    assert "…" not in text
    for task in summary["tasks"]:
        assert format_bytes(task["bytes"]) in text
        assert f"{task['error']:.4f}" in text
    assert {"Task", "a/b", "a_b", "Ünïcode", "Error"} <= set(text.split())


def test_a_terminal_without_unicode_does_not_end_the_program(shared: Path) -> None:
    result = call("info", shared, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0
    assert "org/base" in result.stdout


def test_compress_as_a_program(adapters: Path, tmp_path: Path) -> None:
    result = call("compress", adapters, "-o", tmp_path / "ckpt", "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["tasks"]) == 3
    assert "Traceback" not in result.stderr
    assert_plain([result.stdout, result.stderr])
    again = call("compress", adapters, "-o", tmp_path / "ckpt")
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("Error: ")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Adapters that take seconds to compress and megabytes to store."""
    for seed in range(4):
        make_adapter(tmp_path / "large" / str(seed), rank=32, seed=seed, size=512, layers=12)
    return tmp_path / "large"


def test_a_full_disk_leaves_what_was_there_and_nothing_else(large: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: both are an OSError while writing."""
    output = tmp_path / "out" / "ckpt"
    invoke("compress", large / "0", "-o", output, "--ratio", "1", "--quantize", "none")
    before = same_files(output)
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({1 << 18}, {1 << 18})); "
    program = limit + "from vllm_vlora.tools.cli import main; main()"
    for args, target in (
        (["compress", large / "1", large / "2", "-o", output, "--force"], output),
        (["export", output, "0", "-o", output.parent / "adapter"], output.parent / "adapter"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", program, *map(str, args)],
            capture_output=True,
            encoding="utf-8",
            timeout=300,
            check=False,
        )
        assert result.returncode == 2, result.stderr
        assert result.stderr.splitlines()[-1].startswith(f"Error: cannot write {target}: ")
        assert "Traceback" not in result.stderr
        assert same_files(output) == before
        assert [p.name for p in output.parent.iterdir()] == ["ckpt"]


# A native library may call back into Python, where a signal's exception is raised, and answer with an
# error of its own: safetensors was seen to turn SystemExit into a ValueError.
SWALLOWED = """
import os, sys, time
import vllm_vlora.compression.pipeline as compression
from vllm_vlora.errors import AdapterError
from vllm_vlora.tools.cli import main

NUMBER = int(sys.argv.pop())

def compress(*arguments, **options):
    try:
        os.kill(os.getpid(), NUMBER)
        time.sleep(10)
    except BaseException:
        raise {error}("could not determine the shape") from None

compression.compress = compress
main()
"""


@pytest.mark.parametrize("error", ["ValueError", "AdapterError"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_that_a_library_swallowed_still_ends_the_run_as_one(
    adapters: Path, tmp_path: Path, number: signal.Signals, code: int, error: str
) -> None:
    arguments = ["compress", str(adapters), "-o", str(tmp_path / "ckpt"), str(int(number))]
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED.format(error=error), *arguments],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def unignored() -> None:
    """A shell may have started the tests with signals ignored, which a child would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_run_that_is_to_outlive_its_terminal_does(adapters: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        command("compress", adapters, "-o", tmp_path / "ckpt"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # As nohup does.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=120)
    assert process.returncode == 0
    invoke("validate", tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["ctrl-c", "terminate", "hang-up"],
)
def test_an_interrupted_run_leaves_the_old_checkpoint_and_nothing_else(
    adapters: Path, large: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    output = tmp_path / "out" / "ckpt"
    invoke("compress", adapters, "-o", output)
    before = same_files(output)
    process = subprocess.Popen(
        command("compress", large, "-o", output, "--force"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=unignored,
    )
    assert process.stderr is not None
    said = []
    while not (said and said[-1].startswith("measure")):
        line = process.stderr.readline()
        assert line, said
        said.append(line)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == code, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert same_files(output) == before
    assert [p.name for p in output.parent.iterdir()] == ["ckpt"]


def test_ctrl_c_before_anything_has_begun_shows_no_traceback() -> None:
    program = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, *more):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
from vllm_vlora.tools.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", program, "--version"],
        capture_output=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def run_onto(stdout: int, *args: str | Path, **options: Any) -> tuple[int, str]:
    """The exit code and what stderr got of a command whose output goes there."""
    done = subprocess.run(
        command(*args), stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, **options
    )
    return done.returncode, done.stderr


def test_output_that_nobody_reads_is_no_failed_check() -> None:
    """As of ``validate CKPT | head -1``: code 1 would mean that the checkpoint is damaged."""
    reader, writer = os.pipe()
    os.close(reader)
    assert run_onto(writer, "info", FORMAT2) == (141, "")
    os.close(writer)


def test_output_may_have_nowhere_to_go() -> None:
    def close_stdout() -> None:
        os.close(1)

    assert run_onto(subprocess.DEVNULL, "info", FORMAT2, preexec_fn=close_stdout) == (0, "")
    with open("/dev/full", "w") as full:
        code, said = run_onto(full.fileno(), "info", FORMAT2)
    assert (code, said) == (2, "Error: cannot write the output: No space left on device\n")


def test_info_tells_bits_and_flat_bases() -> None:
    data = json.loads(invoke("info", FORMAT2, "--json").stdout)
    rows = [task["nf4_rows_by_bits"] for task in data["tasks"]]
    assert any(counts.get("3") or counts.get("2") for counts in rows)
    assert any(module["flat"] for module in data["modules"])
    table = invoke("info", FORMAT2).stdout
    assert " bits" in table
    assert "flat " in table


def test_trellis_codes_are_asked_for_and_told(adapters: Path, tmp_path: Path) -> None:
    size = ("--ratio", "8", "--representation", "private")
    invoke("compress", adapters, "-o", tmp_path / "ck", *size, "--codes", "trellis")
    data = json.loads(invoke("info", tmp_path / "ck", "--json").stdout)
    assert data["format_version"] == 5
    for task in data["tasks"]:
        assert list(task["stored_as"]) == ["private trellis"]
        assert sum(task["trellis_rows_by_bits"].values()) > 0
        assert not task["nf4_rows_by_bits"]
    assert "private trellis" in invoke("info", tmp_path / "ck").stdout


def test_a_plan_is_predicted_and_nothing_is_written(adapters: Path, tmp_path: Path) -> None:
    before = same_files(tmp_path)
    data = json.loads(invoke("compress", adapters, "--plan", "--json").stdout)
    ratios = [point["ratio"] for point in data["points"]]
    assert ratios == sorted(ratios)
    assert all(data["original_bytes"] / p["bytes"] >= p["ratio"] for p in data["points"])
    assert "Predicted" in invoke("compress", adapters, "--plan").stdout
    assert "give -o CKPT" in usage_error("compress", adapters)
    asked = ("compress", adapters, "--plan", "--data", tmp_path)
    assert "--plan asks no model" in error_line(*asked)
    assert "--plan asks no model" in error_line(*asked, "--min-kept", "0.9")
    for unused in (
        ("-k", 4),
        ("--ratio", 6),
        ("--max-bytes", "1MB"),
        ("--max-error", 0.1),
        ("-o", tmp_path / "x"),
        ("--force",),
        ("--no-tokenizers",),
    ):
        line = error_line("compress", adapters, "--plan", *unused)
        assert "--plan predicts every size and writes no checkpoint: leave out --" in line
    data = json.loads(invoke("compress", adapters, "--plan", "--codes", "trellis", "--json").stdout)
    assert data["points"]
    assert "clusters must be" in error_line("compress", adapters, "--plan", "--clusters", "\u00b2")
    console = Console(width=200, file=io.StringIO())
    print_curve(console, {"points": [], "original_bytes": 3000, "missing": [2, 3], "gate": None})
    assert "(3.00 kB at 16 bits) are too small for any ratio" in console.file.getvalue()
    assert same_files(tmp_path) == before


def test_a_plan_says_which_sizes_a_gate_leaves_out(adapters: Path) -> None:
    free = json.loads(invoke("compress", adapters, "--plan", "--json").stdout)
    worst = {point["ratio"]: point["worst_error"] for point in free["points"]}
    assert sorted([*worst, *free["missing"]]) == [2, 3, 3.5, 4, 6, 8, 12, 16, 24, 32]
    gate = worst[2] * 1.01
    gated = json.loads(invoke("compress", adapters, "--plan", "--gate", gate, "--json").stdout)
    assert all(point["worst_error"] <= gate for point in gated["points"])
    assert 2 in [point["ratio"] for point in gated["points"]]
    assert len(gated["missing"]) > len(free["missing"])
    shown = invoke("compress", adapters, "--plan", "--gate", gate).stdout
    missing = ", ".join(f"{ratio:g}x" for ratio in gated["missing"])
    assert f"No plan keeps every task within a relative error of {gate:g} at {missing}" in shown
    shown = invoke("compress", adapters, "--plan", "--gate", 1e-9).stdout
    assert "too small" not in shown
    assert "keeps every task within a relative error of 1e-09 at any ratio that is tried" in shown


def test_every_adapter_that_cannot_be_read_is_named(adapters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    for name in ("good", "dora", "broken"):
        shutil.copytree(adapters / "sql", folder / name)
    config = json.loads((folder / "dora" / "adapter_config.json").read_text())
    (folder / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    (folder / "broken" / "adapter_model.safetensors").write_bytes(b"")
    line = error_line("compress", folder, "-o", tmp_path / "ckpt")
    assert "2 of 3 adapters cannot be read" in line
    assert str(folder / "dora") in line
    assert str(folder / "broken") in line
    assert str(folder / "good") not in line
    skipped = ("compress", folder, "-o", tmp_path / "some", "--skip-unreadable")
    result = invoke(*skipped, "--json")
    assert list(Checkpoint.open(tmp_path / "some").tasks) == ["good"]
    left_out = {Path(one["path"]).name: one["why"] for one in json.loads(result.stdout)["left_out"]}
    assert set(left_out) == {"broken", "dora"}
    assert "DoRA" in left_out["dora"]
    assert f"Left out {folder / 'broken'}" in result.stderr.replace("\n", "")
    more = ("add", tmp_path / "some", folder / "broken", f"--name=more={folder / 'good'}")
    line = error_line(*more)
    assert str(folder / "broken") in line
    assert line.endswith("; or give --skip-unreadable, which compresses the others")
    invoke(*more, "--skip-unreadable")
    assert list(Checkpoint.open(tmp_path / "some").tasks) == ["good", "more"]
    assert "dora" in error_line(
        "compress", folder / "dora", "-o", tmp_path / "n", "--skip-unreadable"
    )
    shutil.rmtree(folder / "broken")
    assert "cannot be read" not in error_line("compress", folder, "-o", tmp_path / "ckpt")


@pytest.mark.parametrize(
    ("text", "count"), [("12345", 12345), ("1.5 kB", 1500), ("2MiB", 2 << 20), ("3g", 3 * 10**9)]
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "1 XB", "-5", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="not a size"):
        parse_size(text)


def test_without_matplotlib_an_evaluation_s_page_is_refused_before_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = error_line("evaluate", tmp_path, "--data", "x", "--html", tmp_path / "page.html")
    assert said == 'Error: --html needs matplotlib; pip install "vllm-vlora[evaluate]"'

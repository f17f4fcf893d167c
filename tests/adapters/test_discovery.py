"""Folders of adapters as trainers leave them: what is found, under which ids, and what is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from vllm_vlora import find_adapters
from vllm_vlora.adapters.peft_folder import write_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_files import open_originals
from vllm_vlora.tools.cli import app
from vllm_vlora.tools.inputs import collect

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}


def run(*args: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def adapter(folder: Path, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 16, generator=generator), torch.randn(16, 2, generator=generator)
    return write_adapter(folder, CONFIG, {"model.layers.0.self_attn.q_proj": (a, b)})


LAYOUTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "side by side": (["sql", "chat"], {"chat": "chat", "sql": "sql"}),
    "alone": (["sql"], {"sql": "sql"}),
    "a level between": (
        ["sql/adapter", "chat/final", "fr"], {"chat": "chat/final", "fr": "fr", "sql": "sql/adapter"},
    ),
    "checkpoints": (
        ["sql/checkpoint-500", "chat/checkpoint-1000", "chat/checkpoint-900"],
        {"chat": "chat/checkpoint-1000", "sql": "sql/checkpoint-500"},
    ),
    "checkpoints and the end": (
        ["sql/checkpoint-500", "sql/final", "chat", "chat/checkpoint-5"],
        {"chat": "chat", "sql": "sql/final"},
    ),
    "another adapter name": (
        ["sql/my_adapter", "chat/my_adapter"], {"chat": "chat/my_adapter", "sql": "sql/my_adapter"},
    ),
    "two names in a run": (
        ["sql/one", "sql/two", "chat/adapter"],
        {"chat": "chat/adapter", "sql/one": "sql/one", "sql/two": "sql/two"},
    ),
    "one folder around all": (
        ["out/loras/sql", "out/loras/chat"], {"chat": "out/loras/chat", "sql": "out/loras/sql"},
    ),
    "a run given by itself": (["checkpoint-5", "checkpoint-10"], {"top": "checkpoint-10"}),
    "ends of several names": (["sql/best", "sql/last"], {"best": "sql/best", "last": "sql/last"}),
    "ids that would meet": (
        ["a/final", "b/a/x", "b/c"], {"a": "a/final", "b/a/x": "b/a/x", "b/c": "b/c"},
    ),
    "epochs are tasks": (["epoch_1", "epoch_2"], {"epoch_1": "epoch_1", "epoch_2": "epoch_2"}),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_task_ids_are_what_tells_the_adapters_apart(tmp_path: Path, layout: str) -> None:
    folders, expected = LAYOUTS[layout]
    top = tmp_path / "top"
    for folder in folders:
        (top / folder).mkdir(parents=True, exist_ok=True)
        (top / folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    found = find_adapters(top)
    assert {task: str(path.relative_to(top)) for task, path in found.adapters.items()} == expected
    # Nothing is left out without a word.
    left = {str(path.relative_to(top)) for path in found.passed_over}
    assert left == set(folders) - set(expected.values())


def test_every_place_that_is_passed_over_is_named_with_a_reason(tmp_path: Path) -> None:
    adapter(tmp_path / "sql")
    adapter(tmp_path / "sql" / "checkpoint-3")
    for name, file in {
        "pickled": "adapter_model.bin", "whole": "model.safetensors", "nemo": "x.nemo",
        "zero": "zero_to_fp32.py", "run/deep": "adapter_model.bin", "torchtune": "adapter_0.pt",
    }.items():  # fmt: skip
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "french.gguf").write_bytes(b"GGUF\x03")
    (tmp_path / "old.zip").write_bytes(b"PK\x03\x04")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").symlink_to("../../blobs/1234")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "again").symlink_to(tmp_path)
    found = find_adapters(tmp_path)
    assert list(found.adapters) == ["sql"]
    why = {str(path.relative_to(tmp_path)): text for path, text in found.passed_over.items()}
    for place, said in {
        "sql/checkpoint-3": "lies in the adapter sql", "pickled": "pickle", "whole": "whole model",
        "nemo": "NeMo", "zero": "zero_to_fp32.py", "run/deep": "pickle", "torchtune": "torchtune",
        "notes": "no adapter_config.json in it", "french.gguf": "llama.cpp", "old.zip": "unpack",
        "broken": "../../blobs/1234, which is not there", "loop/again": f"same folder as {tmp_path}",
    }.items():  # fmt: skip
        assert said in why.pop(place), place
    assert why == {}


LINKS: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "beside it": ({"prod": "sql"}, {"prod": "sql"}),
    "in a folder that comes first": ({"a/prod": "../sql"}, {"a/prod": "sql"}),
    "in an adapter that comes first": ({"chat/base": "../sql"}, {"chat/base": "sql"}),
    "in an adapter, to where another link leads too": (
        {"chat/base": "../../elsewhere", "sql/base": "../../elsewhere", "z": "../elsewhere"},
        {"chat/base": "z", "sql/base": "z"},
    ),
    "of a folder of adapters": ({"all": "runs"}, {"all": "runs"}),
    "of links": ({"a": "b", "b": "sql"}, {"a": "sql", "b": "sql"}),
}  # fmt: skip


@pytest.mark.parametrize("case", LINKS)
def test_a_link_takes_no_adapters_place(tmp_path: Path, case: str) -> None:
    """Real folders come first, however they are called, and a second name of one is said to be one."""
    top = tmp_path / "top"
    folders = ["chat", "runs/fr", "sql"]
    for folder in [*folders, "../elsewhere"]:
        adapter(top / folder)
    links, same = LINKS[case]
    for link, target in links.items():
        (top / link).parent.mkdir(exist_ok=True)
        (top / link).symlink_to(target)
    found = find_adapters(top)
    left = {str(path.relative_to(top)): why for path, why in found.passed_over.items()}
    assert left.keys() == same.keys()
    for link, first in same.items():
        assert left[link].startswith(f"the same folder as {top / first}; "), left
    places = [str(path.relative_to(top)) for path in found.adapters.values()]
    assert places == [*folders, *(links.keys() - same.keys())]


def test_a_link_that_leads_to_no_adapter_is_named(tmp_path: Path) -> None:
    adapter(tmp_path / "top" / "sql")
    (tmp_path / "notes").mkdir()
    (tmp_path / "top" / "a").mkdir()
    (tmp_path / "top" / "a" / "link").symlink_to("../../notes")
    found = find_adapters(tmp_path / "top")
    assert found.passed_over == {tmp_path / "top" / "a" / "link": "no adapter_config.json in it"}


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    """To a folder or to a file; in an adapter it is the adapter's own affair."""
    adapter(tmp_path / "fr")
    adapter(tmp_path / "runs" / "de" / "adapter")
    links = {
        "sql": "/gone/adapter",
        "runs/chat": "../gone",
        "old.gguf": "gone.gguf",
        "fr/x": "gone",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(target)
    (tmp_path / "itself").symlink_to("itself")
    found = find_adapters(tmp_path)
    assert list(found.adapters) == ["fr", "runs"]
    advice = "which is not there; copy or download it again"
    assert {str(place.relative_to(tmp_path)): why for place, why in found.passed_over.items()} == {
        "sql": f"a link to /gone/adapter, {advice}",
        "runs/chat": f"a link to ../gone, {advice}",
        "old.gguf": f"a link to gone.gguf, {advice}",
        "itself": "a link to itself, which cannot be followed: Too many levels of symbolic links",
    }


def test_a_folder_of_nothing_but_links_that_lead_nowhere(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "sql").symlink_to("/gone/adapter")
    assert "sql: a link to /gone/adapter" in run(
        "compress", top, "-o", tmp_path / "out", code=2
    ).stderr.replace("\n", " ")


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o111])
def test_a_folder_that_may_not_be_read_is_passed_over(mode: int) -> None:
    nobody, before = 65534, os.geteuid()
    # Not pytest's own, into which nobody else may look.
    with TemporaryDirectory() as name:
        top = Path(name)
        adapter(top / "sql")
        places = [top / "locked", top / "a" / "b" / "locked", top / "models--org--x" / "snapshots"]
        for place in places:
            place.mkdir(parents=True)
            place.chmod(mode)
        top.chmod(0o755)
        if before == 0:
            os.seteuid(nobody)
        try:
            found = find_adapters(top)
        finally:
            os.seteuid(before)
            for place in places:
                place.chmod(0o755)
        assert found.adapters == {"sql": top / "sql"}
        denied = "it cannot be looked into: Permission denied"
        assert found.passed_over == dict.fromkeys(places, denied)


def test_what_peft_saves_under_names_of_its_own(tmp_path: Path) -> None:
    """``save_pretrained`` puts an adapter that is not called default into a sub-folder of its name."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="legal"
    )
    model.save_pretrained(tmp_path / "runs" / "a")
    model.add_adapter("default", LoraConfig(r=2, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "runs" / "b")
    found = find_adapters(tmp_path / "runs")
    assert found.adapters == {
        "a": tmp_path / "runs" / "a" / "legal", "b": tmp_path / "runs" / "b",
    }  # fmt: skip
    assert list(found.passed_over) == [tmp_path / "runs" / "b" / "legal"]


def test_a_cache_of_the_hub(tmp_path: Path) -> None:
    for name in ("sql", "chat"):
        cached = tmp_path / f"models--org--{name}"
        adapter(cached / "snapshots" / "0f3c")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0f3c")
    opened = collect([str(tmp_path)], [])
    assert sorted(opened.adapters) == ["chat", "sql"]
    assert opened.passed_over == {}


def test_compress_says_and_lists_what_it_left_out(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    adapter(runs / "sql" / "adapter", 1)
    adapter(runs / "chat" / "checkpoint-500", 2)
    adapter(runs / "chat" / "checkpoint-20", 3)
    (runs / "pickled").mkdir()
    (runs / "pickled" / "adapter_model.bin").touch()
    path = tmp_path / "ckpt"
    result = run("compress", runs, "-o", path, "--json", "--max-error", 0)
    assert f"{runs} is a folder of adapters: 2 found" in result.stderr
    assert f"Left out {runs / 'pickled'}: it holds only adapter_model.bin" in result.stderr
    data = json.loads(result.stdout)
    assert {task["task"] for task in data["tasks"]} == {"sql", "chat"}
    assert [Path(left["path"]).name for left in data["left_out"]] == ["checkpoint-20", "pickled"]
    # What compressing finds, the commands that look for originals find too.
    originals = open_originals(Checkpoint.open(path), runs)
    assert originals["chat"].path == runs / "chat" / "checkpoint-500"
    assert originals["sql"].path == runs / "sql" / "adapter"


def test_analyze_lists_what_it_left_out(tmp_path: Path) -> None:
    adapter(tmp_path / "a" / "adapter", 1)
    adapter(tmp_path / "b" / "adapter", 2)
    (tmp_path / "notes").mkdir()
    data = json.loads(run("analyze", tmp_path, "--json").stdout)
    assert [found["adapter"] for found in data["adapters"]] == ["a", "b"]
    assert data["left_out"] == [
        {"path": str(tmp_path / "notes"), "why": "no adapter_config.json in it"}
    ]


def test_a_folder_without_any_adapter_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "sql").mkdir()
    (tmp_path / "sql" / "adapter_model.bin").touch()
    result = run("compress", tmp_path, "-o", tmp_path / "ckpt", code=2)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert f"{tmp_path}: no adapter in it; sql: it holds only adapter_model.bin" in line


def test_what_lies_too_deep_to_be_searched_is_named(tmp_path: Path) -> None:
    for name in ("a/b/c/d/e/f", "1/2/3/4/5/6/7", "g"):
        adapter(tmp_path / name)
    found = find_adapters(tmp_path)
    assert set(found.adapters.values()) == {tmp_path / "a/b/c/d/e/f", tmp_path / "g"}
    (place,) = found.passed_over
    assert place == tmp_path / "1/2/3/4/5/6"
    assert "6 levels down, deeper is not searched; give it by itself" in found.passed_over[place]
    assert list(find_adapters(place).adapters.values()) == [place / "7"]


def test_an_id_may_be_given_to_an_adapter_that_lies_deeper(tmp_path: Path) -> None:
    inner = adapter(tmp_path / "sql" / "adapter")
    adapter(tmp_path / "chat" / "adapter")
    opened = collect([str(tmp_path)], [f"SQL={os.path.relpath(inner)}"])
    assert list(opened.adapters) == ["chat", "SQL"]
    assert opened.adapters["SQL"].name == "sql"

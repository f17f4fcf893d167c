"""``python -m vllm_vlora.plugin``, and the table of seams that it and the installation read."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_vlora import plugin
from vllm_vlora.errors import IncompatibleVLLMError
from vllm_vlora.plugin import __main__ as command
from vllm_vlora.plugin.seam_table import SEAMS, MissingSeamError, Seam, find_seams

FOLDER = Path(plugin.__file__).parent
# Seams that only some of the supported versions have; the installed one lacks at most these.
OPTIONAL = {seam.name for seam in SEAMS if seam.optional}


def _owner(module: str, name: str) -> tuple[Any, str]:
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    return owner, last


@pytest.fixture(scope="module", autouse=True)
def _all_imported() -> None:
    """So that what is taken away is missed by nothing of vLLM that is imported later."""
    find_seams(direct=True)


@pytest.fixture
def delete(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    return lambda module, name: monkeypatch.delattr(*_owner(module, name))


def _states(output: str) -> dict[str, str]:
    return {seam["name"]: seam["state"] for seam in json.loads(output)["seams"]}


# --- the command ----------------------------------------------------------------------------------


def test_every_seam_of_the_installed_vllm_is_found() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vllm_vlora.plugin", "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["supported"] is True
    assert report["note"] is None
    assert report["version"].startswith("0.")
    states = _states(done.stdout)
    assert len(states) == len(SEAMS)
    assert {name for name, state in states.items() if state != "found"} <= OPTIONAL


def test_a_seam_that_is_gone_is_missing(
    delete: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    delete("vllm.v1.engine.core", "EngineCore.add_request")
    assert command.main([]) == 1
    printed = capsys.readouterr().out
    assert "  missing  EngineCore.add_request(self, request, request_wave)" in printed
    assert "EngineCore.add_request does not exist" in printed
    assert "1 missing" in printed.splitlines()[-1]


def test_a_class_or_a_module_that_is_gone_is_missing_with_all_its_seams(
    monkeypatch: pytest.MonkeyPatch,
    delete: Callable[[str, str], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    delete("vllm.v1.core.sched.scheduler", "Scheduler")
    # None in sys.modules is a module that cannot be imported.
    monkeypatch.setitem(sys.modules, "vllm.lora.resolver", None)
    assert command.main(["--json"]) == 1
    missing = {
        name for name, state in _states(capsys.readouterr().out).items() if state == "missing"
    }
    assert missing == {
        seam.name
        for seam in SEAMS
        if (seam.name.startswith("Scheduler.") and not seam.optional)
        or seam.module == "vllm.lora.resolver"
    }


@pytest.mark.parametrize(
    ("module", "name", "value", "problem"),
    [
        ("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter",
         lambda self, request, more: None,
         "takes ['self', 'request', 'more'], expected ['self', 'lora_request']"),
        ("vllm.v1.engine.llm_engine", "LLMEngine.add_request",
         lambda self, request_id: None, "has no lora_request argument"),
        ("vllm.lora.model_manager", "LoRAModelManager.lora_slots", 4, "no longer a property"),
        ("vllm.lora.worker_manager", "LRUCacheWorkerLoRAManager._manager_cls", dict,
         "not vLLM's own"),
    ],
)  # fmt: skip
def test_a_seam_that_is_not_what_it_was_is_changed(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    name: str,
    value: Any,
    problem: str,
) -> None:
    monkeypatch.setattr(*_owner(module, name), value)
    assert command.main(["--json"]) == 1
    seams = json.loads(capsys.readouterr().out)["seams"]
    changed = [seam for seam in seams if seam["state"] == "changed"]
    assert [seam["name"] for seam in changed] == [name]
    assert problem in changed[0]["problem"]


def test_what_only_instances_hold_is_found_where_a_method_sets_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manager, _ = _owner("vllm.lora.model_manager", "LoRAModelManager.modules")
    init = manager.__init__

    def other(self: Any, lora_config: Any, vllm_config: Any) -> None:
        self.layers_by_name = init

    monkeypatch.setattr(manager, "__init__", other)
    assert command.main(["--json"]) == 1
    states = _states(capsys.readouterr().out)
    assert states["LoRAModelManager.modules"] == "missing"
    assert states["LoRAModelManager.lora_slots"] == "found"


def test_what_a_supported_version_may_lack_is_absent(
    delete: Callable[[str, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    delete("vllm.lora.lora_weights", "LoRAFullModuleWeights")
    assert command.main(["--json"]) == 0
    assert _states(capsys.readouterr().out)["LoRAFullModuleWeights"] == "absent"


def test_what_a_wrapped_method_sets_is_found() -> None:
    """vLLM wraps the method in which its model runner sets most of what it holds."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert hasattr(GPUModelRunner.__init__, "__wrapped__")
    seam = Seam("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.cudagraph_dispatcher", "")
    assert seam.find().value is None


@pytest.mark.parametrize("number", ["0.27.1", "0.34.0"])
def test_a_version_that_was_not_tried_is_said_and_looked_into(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    monkeypatch.setenv("VLLM_VLORA_ALLOW_UNTESTED", "1")
    for module in (plugin, command):
        monkeypatch.setattr(module, "_vllm_version", lambda: number)
    assert command.main([]) == 0
    assert capsys.readouterr().out.startswith(f"vLLM {number} is not between 0.28 and 0.34")
    assert command.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["version"], report["supported"]) == (number, False)


def test_without_vllm_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert command.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "vLLM is not installed" in printed.err
    assert "pip install 'vllm-vlora[serve]'" in printed.err


def test_the_help_explains_states_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    for word in ("found", "changed", "missing", "absent", "exit codes:", "examples:"):
        assert word in printed


# --- the table ------------------------------------------------------------------------------------


def test_the_installation_checks_the_table(
    monkeypatch: pytest.MonkeyPatch, delete: Callable[[str, str], None]
) -> None:
    scheduler, _ = _owner("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output")
    monkeypatch.setattr(scheduler, "update_from_output", lambda self: None)
    find_seams(direct=False)
    with pytest.raises(IncompatibleVLLMError, match=r"Scheduler\.update_from_output takes"):
        find_seams(direct=False, limits=True)
    delete("vllm.v1.engine.core", "EngineCore.add_lora")
    with pytest.raises(MissingSeamError, match=r"EngineCore\.add_lora does not exist"):
        find_seams(direct=False)
    monkeypatch.undo()
    delete("vllm.lora.layers", "BaseLayerWithLoRA.set_mapping")
    with pytest.raises(IncompatibleVLLMError, match=r"set_mapping does not exist"):
        find_seams(direct=False)


def test_names_of_seams_are_distinct() -> None:
    assert len({seam.name for seam in SEAMS}) == len(SEAMS)


# What vLLM documents for everybody.
PUBLIC = {"vllm.LLM", "vllm.SamplingParams"}


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.name)
def test_everything_imported_from_vllm_is_in_the_table(file: Path) -> None:
    known = {f"{seam.module}.{seam.name}" for seam in SEAMS} | PUBLIC
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                assert any(f"{seam}.".startswith(f"{name}.") for seam in known), name


def test_every_method_that_our_manager_overrides_is_in_the_table() -> None:
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    from vllm_vlora.plugin.manager import TaskLoRAManager

    known = {seam.name.split(".")[-1] for seam in SEAMS if "LoRAModelManager." in seam.name}
    for name, value in vars(TaskLoRAManager).items():
        if callable(value) or isinstance(value, property):
            assert name in known or not hasattr(LRUCacheLoRAModelManager, name), name


def test_the_scheduler_is_patched_where_the_table_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_vlora.plugin.limits import limit_tasks
    from vllm_vlora.plugin.settings import Settings

    places = find_seams(direct=False, limits=True)
    patches = limit_tasks([], Settings("direct", fair=True), places, direct=True)
    assert len(patches) == 3
    for owner, attribute, _ in patches:
        place = places[f"{owner.__name__}.{attribute}"]
        assert (place.owner, place.attribute) == (owner, attribute)


@pytest.mark.parametrize("more", [(), ("reasoning_effort_map",)], ids=["0.28 to 0.32", "0.33"])
def test_a_chat_is_rendered_by_requests_of_every_version(
    more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is passed on as it comes may grow."""
    taken = ", ".join(f"{name}=None" for name in ("default_template_content_format", *more))
    build = eval(f"lambda self, default_template, {taken}: None")
    for seam in (seam for seam in SEAMS if seam.name.endswith(".build_chat_params")):
        owner = seam.find().owner
        monkeypatch.setattr(owner, "build_chat_params", build)
        assert seam.find().value is build

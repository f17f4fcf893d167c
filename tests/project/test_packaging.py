"""What is published: a wheel that brings all that it imports, and nothing that is not the package."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGE = ROOT / "vllm_vlora"
FILES = sorted(
    {*PACKAGE.rglob("*.py"), *PACKAGE.glob("tools/*.py"), *PACKAGE.glob("triton_kernels/*.py")}
)
# What the wheel is made of.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "vllm_vlora", "tools", "triton_kernels")
# What files import at once though the package installs without it: the plugin and the kernels run
# inside vLLM, which brings these, and this file says in its own words what it needs.
INSIDE_VLLM = {"vllm", "triton", "fastapi", "starlette", "blake3"}
SAYS_WHAT_IT_NEEDS = {PACKAGE / "integrations" / "huggingface.py": {"transformers"}}


def _declared(requirements: list[str]) -> set[str]:
    names = (re.match(r"[\w.-]+", requirement) for requirement in requirements)
    return {name[0].replace("-", "_") for name in names if name}


def _imported(tree: ast.AST, *, at_once: bool) -> Iterator[str]:
    """Packages of others that a file imports, with or without those of its functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if at_once and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]
        yield from _imported(node, at_once=at_once)


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_package_that_is_imported_is_declared(file: Path) -> None:
    always = _declared(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    ever = always.union(*(_declared(extras[name]) for name in extras if name != "dev"))
    own = {*sys.stdlib_module_names, "vllm_vlora"}
    tree = ast.parse(file.read_text())
    at_once = set(_imported(tree, at_once=True)) - own
    assert at_once <= always | INSIDE_VLLM | SAYS_WHAT_IT_NEEDS.get(file, set())
    assert set(_imported(tree, at_once=False)) - own <= ever | INSIDE_VLLM


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, the wheel made of it, and in `direct` the wheel of the tree itself."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    tree.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            leave = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, tree / name, symlinks=True, ignore=leave)
        else:
            shutil.copy(source, tree)
    build = [sys.executable, "-m", "build", "--no-isolation", "-o"]
    for arguments in ([folder, tree], [folder / "direct", "--wheel", tree]):
        done = subprocess.run([*build, *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _wheel(folder: Path) -> dict[str, bytes]:
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    names = set(_wheel(built))
    inside = {name for name in names if ".dist-info/" not in name}
    there = {str(file.relative_to(ROOT)) for file in FILES} | {"vllm_vlora/py.typed"}
    assert inside == there
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_an_image_is_built_from_what_the_wheel_is_made_of() -> None:
    """``examples/deploy/Dockerfile`` copies its context, where `make demo` leaves gigabytes."""
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    first, *others = (rule for rule in rules if not rule.startswith("#"))
    assert first == "*"
    assert {rule[1:] for rule in others if rule.startswith("!")} == set(SOURCES)
    assert [rule for rule in others if not rule.startswith("!")] == ["**/__pycache__"]


def test_the_source_distribution_makes_the_same_wheel(built: Path) -> None:
    assert _wheel(built) == _wheel(built / "direct")
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        members = packed.getmembers()
    assert not [member.name for member in members if not (member.isfile() or member.isdir())]
    assert not [member.name for member in members if "/tests/" in member.name]


def test_what_the_wheel_says_of_itself(built: Path) -> None:
    wheel = _wheel(built)
    (name,) = [name for name in wheel if name.endswith(".dist-info/METADATA")]
    said: Message = Parser().parsestr(wheel[name].decode())
    assert said["Requires-Python"] == ">=3.10"
    assert said["License-Expression"] == "Apache-2.0"
    versions = {word for word in said.get_all("Classifier", []) if "Python :: 3." in word}
    assert {word.rpartition(" ")[2] for word in versions} == {"3.10", "3.11", "3.12", "3.13"}
    (entry,) = [name for name in wheel if name.endswith("entry_points.txt")]
    assert wheel[entry].decode().split() == [
        *("[console_scripts]", "vllm-vlora", "=", "vllm_vlora.tools.__main__:main"),
        *(
            "[vllm.endpoint_plugins]",
            "vlora_tasks",
            "=",
            "vllm_vlora.plugin.task_routes:TaskRoutes",
        ),
        *("[vllm.general_plugins]", "vlora", "=", "vllm_vlora.plugin:register"),
    ]


WITHOUT_EXTRAS = """
import importlib, pkgutil, sys

OPTIONAL = {"vllm", "triton", "transformers", "peft", "matplotlib", "ray", "bitsandbytes"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import vllm_vlora

for module in pkgutil.walk_packages(vllm_vlora.__path__, "vllm_vlora."):
    if module.name.rpartition(".")[2] != "__main__":
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(module.name, str(error).replace("\\n", " "), sep="\\t")
for name in vllm_vlora.__all__:
    try:
        getattr(vllm_vlora, name)
    except ImportError as error:
        print(name, error, sep="\\t")
"""


def test_every_module_and_name_is_there_without_extras() -> None:
    """But for what runs inside vLLM, the kernels, and what says which extra it needs."""
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", WITHOUT_EXTRAS],
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        name, error = line.split("\t")
        inside = name == "lora_request" or name.startswith(
            ("vllm_vlora.plugin.", "vllm_vlora.triton_kernels.")
        )
        assert (inside and re.search("'(vllm|triton)[.']", error)) or "pip install" in error, line

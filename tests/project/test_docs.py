"""The pages of ``docs/``: complete navigation, links that lead somewhere, commands and code that exist.

``make docs`` builds the site; this needs nothing of it.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
import yaml
from documented_world import DocumentedWorld
from places import ROOT
from typer.testing import CliRunner

import vllm_vlora
from vllm_vlora import Checkpoint, open_adapter
from vllm_vlora.adapters.peft_folder import write_adapter
from vllm_vlora.tools.cli import app

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
COMMANDS: Any = typer.main.get_command(app)
# Typer has a click of its own, or takes the installed one.
REFUSED = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
# Their blocks of "python" run, in one namespace a page, with the names of the documented world in scope.
# Blocks of "py", which need what is not there (a GPU, a Hub), are only compiled.
RUN = ["compressing.md", "training.md", "migration.md"]
_DIRECTIVE = re.compile(r"^::: (\S+)$", re.MULTILINE)
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:^    .*\n|^\s*\n(?=    ))+", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# --- the site ------------------------------------------------------------------------------------


def _nav(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
        return
    for part in entry.values() if isinstance(entry, dict) else entry:
        yield from _nav(part)


def test_every_page_is_in_the_navigation_once() -> None:
    listed = list(_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Python-Markdown makes them."""
    text = _FENCE.sub("", page.read_text())
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        slug = re.sub(r"[-\s]+", "-", plain.strip().lower())
        number, unique = 0, slug
        while unique in found:
            number += 1
            unique = f"{slug}_{number}"
        found.add(unique)
    return found


@pytest.mark.parametrize("page", TEXTS, ids=_name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in _LINK.findall(_FENCE.sub("", page.read_text())):
        if "://" in target:
            assert target.startswith("https://"), target
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{_name(page)} links to {target}, which is not there"
        if DOCS in page.parents:
            assert DOCS in linked.parents, f"{target} leads out of the site"
        if anchor:
            assert anchor in _anchors(linked), f"{_name(page)}: no heading for {target}"


@pytest.mark.parametrize("page", TEXTS, ids=_name)
def test_rows_of_a_table_have_the_columns_of_its_head(page: Path) -> None:
    columns = 0
    for line in _FENCE.sub("", page.read_text()).splitlines():
        bars = re.sub(r"`[^`]*`", "", line).replace(r"\|", "").count("|")
        columns = (columns or bars) if line.startswith("|") else 0
        assert not columns or bars == columns, f"{_name(page)}: {line}"


@pytest.mark.parametrize("page", TEXTS, ids=_name)
def test_scripts_and_tests_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(r"\b(?:examples|benchmarks|tests)/[\w/]+\.py\b", page.read_text())
    missing = [path for path in named if not (ROOT / path).is_file()]
    assert not missing, f"{_name(page)} names {', '.join(missing)}"


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 12_000, "details go to docs/"


@pytest.mark.parametrize("name", ["README.md", "docs/measurements.md"])
def test_tables_of_figures_say_on_what_they_were_measured(name: str) -> None:
    text = (ROOT / name).read_text()
    # The README's other table lists versions.
    tables = len(re.findall(r"^\|[-:| ]+\|$", text, re.MULTILINE)) - (name == "README.md")
    assert tables == len(re.findall(r"^Measured on: ", text, re.MULTILINE))


def _resolve(path: str) -> Any:
    """What a dotted path names, through modules as far as there are some."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            thing: Any = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(path)


def test_the_reference_has_every_public_name_once_and_no_other() -> None:
    listed = [
        path
        for page in (DOCS / "reference").glob("*.md")
        for path in _DIRECTIVE.findall(page.read_text())
    ]
    assert len(set(listed)) == len(listed)
    public = {f"vllm_vlora.{name}" for name in vllm_vlora.__all__ if name != "__version__"}
    assert not public - set(listed), "no page of docs/reference shows these"
    for path in set(listed) - public:
        assert not isinstance(_resolve(path), ModuleType), path


# --- what the pages say --------------------------------------------------------------------------


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every code block, fenced or indented; indented ones have no language."""
    text = page.read_text()
    yield from _FENCE.findall(text)
    for block in _INDENTED.findall(_FENCE.sub("", text)):
        yield "", inspect.cleandoc(block)


def _command_lines(page: Path) -> Iterator[str]:
    """The lines of shell blocks, joined where they go on, one command each."""
    for language, text in _blocks(page):
        if language in ("", "bash", "sh", "console"):
            for line in re.sub(r"\\\n\s*", "", text).splitlines():
                yield from re.split(r"\s(?:&&|\|)\s", line.removeprefix("$ "))


def _calls(page: Path) -> list[list[str]]:
    """The arguments of every call of ``vllm-vlora`` on a page."""
    calls = []
    for line in _command_lines(page):
        if "vllm-vlora " not in line:
            continue
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        if words and words[0] == "vllm-vlora":
            calls.append([word for word in words[1:] if word != "..."])
    return calls


@pytest.mark.parametrize("page", TEXTS, ids=_name)
def test_commands_on_a_page_are_calls_that_the_command_line_takes(page: Path) -> None:
    for words in _calls(page):
        shown = f"{_name(page)}: vllm-vlora {' '.join(words)}"
        if words[0].startswith("-"):
            assert words[0] in ("--version", "--help", "-h"), shown
            continue
        command = COMMANDS.commands.get(words[0])
        assert command is not None, f"{shown}: no such command"
        try:
            # Parses and converts; nothing is run.
            command.make_context(words[0], words[1:])
        except REFUSED as error:
            pytest.fail(f"{shown}: {error.format_message()}")  # type: ignore[attr-defined]


def _python(page: Path, *languages: str) -> list[str]:
    return [text for language, text in _blocks(page) if language in languages]


@pytest.mark.parametrize("page", TEXTS, ids=_name)
def test_python_on_a_page_compiles_and_imports_what_there_is(page: Path) -> None:
    for source in _python(page, "python", "py"):
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm_vlora"):
                module = import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "vllm_vlora":
                assert hasattr(vllm_vlora, node.attr), f"vllm_vlora.{node.attr}"


@pytest.mark.parametrize("name", RUN)
def test_the_python_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = _python(DOCS / name, "python")
    assert sources, f"{name} has no Python block"
    world = DocumentedWorld(tmp_path)
    scope = world.names("\n".join(sources)) | {"__name__": "__main__"}
    monkeypatch.chdir(world["folder"])
    for number, source in enumerate(sources):
        exec(compile(source, f"{name}, block {number}", "exec"), scope)


def test_the_quickstart_runs_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that needs neither the model nor vLLM, on two layers of three of the demo's adapters."""
    demo = Path("examples", "demo", "adapters")
    for name in ("french", "sql", "todo"):
        adapter = open_adapter(ROOT / demo / name)
        some = [module for module in adapter.modules if re.search(r"layers\.[01]\.", module)]
        write_adapter(tmp_path / demo / name, adapter.config, adapter.iter_factors(some))
    monkeypatch.chdir(tmp_path)
    page = DOCS / "quickstart.md"
    for words in _calls(page):
        if words[0] == "serve":
            # Run, it would become vLLM in place of the tests.
            words = ["serve", "--dry-run", *words[1:]]
        if words[0] != "evaluate":
            done = CliRunner().invoke(app, words)
            assert done.exit_code == 0, f"vllm-vlora {' '.join(words)}: {done.output}"
    assert sorted(Checkpoint.open("my-tasks").tasks) == ["french", "sql", "todo"]
    assert open_adapter("sql-lora").base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    for source in _python(page, "python"):
        exec(compile(source, page, "exec"), {"__name__": "__main__"})
    assert Checkpoint.open("python-tasks").ratio >= 6
    assert list(open_adapter("french-lora").modules) == list(open_adapter(demo / "french").modules)


def test_a_wrong_command_is_found() -> None:
    with pytest.raises(REFUSED, match="no-such-option"):
        COMMANDS.commands["info"].make_context("info", ["ckpt", "--no-such-option"])

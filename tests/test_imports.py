"""Imports run one way: tools -> library -> checkpoint; plugin -> library and triton_kernels."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vllm_vlora"
# What each part may import beside itself; the library's own order is the list below.
FORBIDDEN = {
    "library": ("vllm", "triton", "typer", "rich", "vllm_vlora.plugin", "vllm_vlora.tools",
                "vllm_vlora.triton_kernels"),
    "plugin": ("typer", "rich", "vllm_vlora.tools"),
    "triton_kernels": ("vllm", "typer", "rich", "vllm_vlora.plugin", "vllm_vlora.tools",
                       "vllm_vlora.checkpoint.reader"),
    "tools": ("vllm", "triton", "vllm_vlora.triton_kernels"),
}  # fmt: skip
LIBRARY_ORDER = [
    "errors", "_version", "modes", "task_ids", "atomic", "hub", "executors", "whitening", "moments",
    "texts", "calibration", "quantize", "options", "peft_config", "adapters", "manifest",
    "checkpoint", "representations", "evaluation", "fit", "flat_fit", "clusters", "collection",
    "formats", "scratch", "allocation", "measure", "flat", "survey", "sharing", "plan", "encoding",
    "report", "contents", "card", "model_layers", "memory", "compression", "projection", "growth",
    "editing", "adding", "recovery", "export", "rebuilding", "validation", "foreign.files",
    "foreign.lorashare_files", "foreign.vlora_files", "foreign.convert", "hub_repository",
    "share_model", "subspace.algebra", "subspace.layers", "subspace.rounding", "subspace.tasks",
    "subspace.weights", "subspace.analysis", "subspace.members", "subspace.fitting",
    "subspace.merging", "subspace.storage", "subspace.sizes", "subspace.state",
    "subspace.refitting", "subspace.shared", "subspace.blending", "subspace.pipeline",
    "subspace.router", "subspace.updates", "subspace.attaching", "subspace.heads", "subspace.model",
    "subspace.training", "integrations.huggingface",
]  # fmt: skip


def _part(file: Path) -> str:
    name = file.relative_to(PACKAGE).parts[0]
    return name if name in ("plugin", "triton_kernels", "tools") else "library"


def _imports(file: Path) -> set[str]:
    """Modules that a file imports at any depth, those for type checkers only left out."""
    tree = ast.parse(file.read_text())
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


FILES = sorted(p for p in PACKAGE.rglob("*.py")) + [
    p for folder in ("triton_kernels", "tools") for p in sorted((PACKAGE / folder).glob("*.py"))
]


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_part_imports_what_stands_above_it(file: Path) -> None:
    for name in _imports(file):
        for banned in FORBIDDEN[_part(file)]:
            assert not f"{name}.".startswith(f"{banned}."), f"{file} imports {name}"


def _module(file: Path) -> str:
    """Dotted name below the package: "fit", "subspace.shared"."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def test_the_library_imports_in_one_order() -> None:
    files = {
        _module(file): file
        for file in PACKAGE.rglob("*.py")
        if _part(file) == "library" and file.stem != "__init__"
    }
    assert set(files) == set(LIBRARY_ORDER)
    for place, module in enumerate(LIBRARY_ORDER):
        later = set(LIBRARY_ORDER[place:])
        for name in _imports(files[module]):
            imported = name.removeprefix("vllm_vlora.")
            assert imported == name or imported not in later, f"{module} imports {imported}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import vllm_vlora", ["torch", "vllm", "triton"]),
        ("import vllm_vlora.plugin", ["torch", "vllm", "triton"]),
        ("from vllm_vlora import compress, Checkpoint", ["vllm", "triton", "typer"]),
        ("import vllm_vlora.tools.cli", ["torch", "vllm"]),
    ],
)
def test_what_an_import_brings_along(statement: str, absent: list[str]) -> None:
    script = f"import sys; {statement}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.strip() == "[]"


def test_functions_win_over_modules_of_the_same_package() -> None:
    import vllm_vlora

    for name in vllm_vlora.__all__:
        assert getattr(vllm_vlora, name) is not None
    assert callable(vllm_vlora.compress)
    assert callable(vllm_vlora.validate)


def test_the_kernels_never_answer_to_the_bare_name() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import triton_kernels"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert "vllm_vlora.triton_kernels" in done.stderr

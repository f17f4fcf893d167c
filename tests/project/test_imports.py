"""Imports run one way: a room imports only the rooms that the table below allows it."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = ROOT / "vllm_vlora"
GROUND = "ground"
# Rooms of the library from the ground up: each may import the ground and those before it.
LIBRARY = (
    "representations",
    "adapters",
    "fitting",
    "checkpoint",
    "blending",
    "foreign",
    "planning",
    "compression",
    "editing",
    "subspace",
    "merging",
    "model",
    "evaluation",
    "integrations",
)
# Room -> the rooms that it may import, the ground and itself always among them.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    GROUND: (),
    "triton_kernels": (),
    **{room: LIBRARY[:place] for place, room in enumerate(LIBRARY)},
    "plugin": ("representations", "adapters", "checkpoint", "blending", "triton_kernels"),
    "tools": (*LIBRARY, "plugin"),
}
# Rooms that hand on names under their own.
FACES = ("adapters", "checkpoint", "compression")
# What of other packages a room may not import. Only the plugin touches vLLM, only kernels Triton.
FORBIDDEN = {
    **dict.fromkeys((GROUND, *LIBRARY), ("vllm", "triton", "typer", "rich")),
    "plugin": ("typer", "rich"),
    "triton_kernels": ("vllm", "typer", "rich"),
    "tools": ("vllm", "triton"),
}
# The offline memory plan and the settings answer where no vLLM is installed.
WITHOUT_VLLM = ("plugin/memory.py", "plugin/model_layers.py", "plugin/settings.py")


def _room(file: Path) -> str:
    parts = file.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else GROUND


def _module(file: Path) -> str:
    """Dotted name below the package: "errors", "fitting.clusters", "subspace" for its face."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Path, *, when_run: bool = True) -> set[str]:
    """Modules that a file imports, with or without those of its functions; none for type checkers."""
    tree = ast.parse(file.read_text())
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.FunctionDef) and not when_run:
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
MODULES = {_module(file): file for file in FILES if file != PACKAGE / "__init__.py"}
ROOMS = {_module(file): _room(file) for file in FILES}


def _own_imports(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    # An operation is defined in one file and imports its kernel, which stands on it, when it runs.
    when_run = ROOMS[module] != "triton_kernels"
    names = {
        name.removeprefix("vllm_vlora.") for name in _imports(MODULES[module], when_run=when_run)
    }
    return {name for name in names if name in MODULES and name != module}


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_room_imports_what_stands_above_it(file: Path) -> None:
    room = _room(file)
    banned = FORBIDDEN[room]
    if str(file.relative_to(PACKAGE)) in WITHOUT_VLLM:
        banned = (*banned, "vllm", "triton")
    for name in _imports(file):
        assert not any(f"{name}.".startswith(f"{other}.") for other in banned), name
    if file == PACKAGE / "__init__.py":  # It imports on first use, and then from every room.
        return
    allowed = {GROUND, room, *MAY_IMPORT[room]}
    for name in _own_imports(_module(file)):
        assert ROOMS[name] in allowed, f"{file} imports {name}"


def test_every_room_is_in_the_table_and_says_what_it_is_for() -> None:
    assert set(ROOMS.values()) == set(MAY_IMPORT)
    for room in set(ROOMS.values()) - {GROUND}:
        text = ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
        assert text, f"{room} has no docstring"


def _defined(file: Path) -> set[str]:
    """The names that a file defines at its top level, those for type checkers among them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_files_import_a_name_from_the_file_that_defines_it() -> None:
    """``from vllm_vlora.adapters import Adapter`` is for users; here it would hide where a name lives."""
    defined = {module: _defined(file) for module, file in MODULES.items()}
    for file in MODULES.values():
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            source = node.module.removeprefix("vllm_vlora.")
            for alias in node.names if source in MODULES else ():
                there = alias.name in defined[source] or f"{source}.{alias.name}" in MODULES
                assert there, f"{file} imports {alias.name} from {source}"


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_programs_import_names_that_are_there(folder: str) -> None:
    """At any depth: most of a benchmark is imported when it runs, which no test does."""
    faces = {room: _exported(PACKAGE / room / "__init__.py") for room in FACES}
    defined = {module: _defined(file) for module, file in MODULES.items()} | faces
    defined[""] = _exported(PACKAGE / "__init__.py")
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("vllm_vlora."):
                source = (node.module or "").removeprefix("vllm_vlora").removeprefix(".")
                for alias in node.names:
                    path = f"{source}.{alias.name}".removeprefix(".")
                    assert alias.name in defined[source] or path in MODULES, f"{file}: {path}"


def _exported(face: Path) -> set[str]:
    """``__all__`` of a file."""
    for node in ast.parse(face.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{face} has no __all__")


def _levels(graph: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """The modules level by level, each above all it imports; what is left over stands in circles."""
    left = {module: set(imported) for module, imported in graph.items()}
    while left:
        level = sorted(module for module, imported in left.items() if not imported & set(left))
        if not level:
            raise AssertionError(f"circles among {sorted(left)}")
        yield level
        for module in level:
            del left[module]


def test_no_two_files_import_each_other(record_property: Callable[[str, object], None]) -> None:
    """And shows the shape of the graph: levels of files and of rooms, circles, arrows that go up."""
    graph = {module: _own_imports(module) for module in MODULES}
    files = list(_levels(graph))
    between: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for module, imported in graph.items():
        room = ROOMS[module]
        between[room] |= {ROOMS[name] for name in imported} - {room}
    rooms = list(_levels(between))
    up = sum(
        other not in (GROUND, *MAY_IMPORT[room])
        for room, others in between.items()
        for other in others
    )
    record_property(
        "shown",
        f"imports: {len(graph)} files on {len(files)} levels, {len(between)} rooms on {len(rooms)}, "
        f"0 circles, {up} arrows up",
    )
    assert up == 0


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


def test_a_plain_install_has_every_other_name() -> None:
    """``import *`` where no package is that pyproject does not require."""
    script = """
        import sys
        for name in ("vllm", "triton", "transformers", "peft", "ray", "matplotlib", "jinja2"):
            sys.modules[name] = None
        from vllm_vlora import *
        import vllm_vlora
        print(sorted(set(vllm_vlora._HOMES) - set(globals())))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd="/"
    )
    serving = ["lora_request", "publish", "publish_async", "unpublish", "unpublish_async"]
    assert done.stdout.strip() == str(serving), done.stderr


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

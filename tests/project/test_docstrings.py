"""Every public name is documented, and the examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from documented_world import DocumentedWorld

import vllm_vlora

# Public under vlora's own module path, and not among the names of the package.
ELSEWHERE = ["vllm_vlora.integrations.huggingface.VLoRACallback"]
NAMES = [f"vllm_vlora.{name}" for name in vllm_vlora.__all__ if name != "__version__"] + ELSEWHERE
# They need a running engine, in which tests/engine/test_memory_tasks*.py call them.
WITH_AN_ENGINE = {
    f"vllm_vlora.{name}" for name in ("publish", "publish_async", "unpublish", "unpublish_async")
}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


def _examples(thing: Any, name: str) -> list[doctest.DocTest]:
    """The docstrings with examples of a function, or of a class and its own methods."""
    found = doctest.DocTestFinder().find(thing, name, globs={})
    return [test for test in found if test.examples]


def _run(test: doctest.DocTest, folder: Path) -> str:
    """What the examples of one docstring got wrong; empty if nothing."""
    folder.mkdir()
    world = DocumentedWorld(folder)
    test.globs = world.names("".join(example.source for example in test.examples))
    torch.manual_seed(0)
    report: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world["folder"])
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_AN_ENGINE])
def test_the_examples_of_a_public_name(name: str, tmp_path: Path) -> None:
    tests = _examples(_resolve(name), name)
    assert tests, f"{name} has no example; show in two to five lines how it is used"
    for number, test in enumerate(tests):
        wrong = _run(test, tmp_path / str(number))
        assert not wrong, wrong


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_and_its_methods_say_what_they_do(name: str) -> None:
    thing = _resolve(name)
    assert _own_doc(thing), f"{name} has no docstring"
    members = vars(thing).items() if inspect.isclass(thing) else ()
    for member, value in members:
        if member.startswith("_") or not _is_code(value):
            continue
        assert inspect.getdoc(getattr(thing, member)), f"{name}.{member} has no docstring"


def _own_doc(thing: Any) -> str:
    """A docstring that somebody wrote: a dataclass without one gets its signature."""
    doc = thing.__doc__ or ""
    return "" if inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(") else doc


def _is_code(value: Any) -> bool:
    return isinstance(value, (property, classmethod, staticmethod)) or inspect.isfunction(value)


def test_a_wrong_example_is_found(tmp_path: Path) -> None:
    def wrong() -> None:
        """Not what it says.

        >>> len(adapter_dirs)
        5
        """

    (test,) = _examples(wrong, "wrong")
    assert "Expected:\n    5\nGot:\n    4" in _run(test, tmp_path / "wrong")

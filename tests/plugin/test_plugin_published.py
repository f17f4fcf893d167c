"""What an engine core does with tasks from memory: names, versions that leave, what workers say."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_vlora.blend_names import Term

pytest.importorskip("vllm")

from vllm_vlora.plugin import published
from vllm_vlora.plugin.blend_paths import blend_path
from vllm_vlora.plugin.identity import MEMORY, TaskPath
from vllm_vlora.plugin.published import ELSEWHERE, adopt, offer, release, unpublish, withdraw
from vllm_vlora.plugin.workers import Workers

OLD, NEW, OTHER, LAST = (f"/dev/null/vllm_vlora.publish/tasks/t.safetensors@{n}" for n in "abcd")


class Core:
    """An engine core whose workers say what a test has them say."""

    def __init__(self, answers: list[str] | None = None, *, process: bool = False) -> None:
        self.in_use: set[str] = set()
        self.awaited: set[str] = set()
        self.pinned: set[str] = set()
        self.held: list[str] = []
        self.left: list[str] = []
        self.discarded: list[str] = []
        self.answers = answers or [""]
        executor = SimpleNamespace(collective_rpc=self._ask, uses_ray=False)
        self._vlora_tasks_held = SimpleNamespace(
            published={},
            unpublished={},
            looks=None,
            followed=False,
            letting_in=False,
            workers=Workers(executor),
            residency=SimpleNamespace(
                in_use=lambda: self.in_use,
                forget=self._forget,
                is_pinned=self.pinned.__contains__,
                paths=lambda: self.held,
            ),
            arrivals=SimpleNamespace(paths=lambda: self.awaited),
        )
        if process:
            self.input_queue: queue.Queue[Any] = queue.Queue()

    @property
    def tasks(self) -> Any:
        return self._vlora_tasks_held

    def _ask(self, asked: Any, args: tuple[Any, ...]) -> list[str]:
        if asked is published._discard:
            self.discarded += args
        return self.answers

    def _forget(self, path: str, wholly: bool) -> None:
        assert wholly
        self.left.append(path)


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (["", ""], ""),
        (["", "too high a rank"], "too high a rank"),
        (["", ELSEWHERE], ELSEWHERE),
        # What is wrong with a task stays wrong when it is sent again.
        ([ELSEWHERE, "too high a rank"], "too high a rank"),
    ],
)
def test_an_offer_is_answered_with_what_a_worker_has_against_it(
    answers: list[str], said: str
) -> None:
    assert offer(Core(answers), b"{}") == said


def test_a_version_leaves_when_no_request_needs_it() -> None:
    core = Core()
    assert adopt(core, "t", OLD) == ""
    core.in_use = {OLD}
    assert adopt(core, "t", NEW) == OLD
    assert core.tasks.published == {"t": NEW}
    release(core)
    assert core.left == []
    # It ran to its end, and another request of it waits for a device, or somebody pinned it.
    core.in_use = set()
    for needs in (core.awaited, core.pinned):
        needs.add(OLD)
        release(core)
        assert core.left == []
        needs.clear()
    release(core)
    assert core.left == core.discarded == [OLD]
    release(core)
    assert core.left == [OLD]


def test_who_is_told_again_after_another_published_keeps_what_is_served() -> None:
    core = Core()
    adopt(core, "t", OLD)
    core.in_use = {OLD}
    adopt(core, "t", NEW)
    assert adopt(core, "t", OLD) == NEW
    core.in_use = set()
    release(core)
    assert core.left == core.discarded == [NEW]
    assert core.tasks.published == {"t": OLD}


def test_api_servers_are_given_time_to_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core()
    core.tasks.followed = True
    adopt(core, "t", OLD)
    assert unpublish(core, "t") == OLD
    assert core.left == []
    later = time.monotonic() + published.GRACE + 1
    monkeypatch.setattr(published, "time", SimpleNamespace(monotonic=lambda: later))
    release(core)
    assert core.left == [OLD]


def test_versions_in_their_time_cost_a_request_nothing_and_the_others_one_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every request looks: with 10,000 tasks on the device each version took it 1.4 ms."""
    core = Core()
    core.tasks.followed = True
    held = [f"/ck/tasks/{number}.safetensors@{number:032x}" for number in range(100)]
    looks = 0

    def paths() -> list[str]:
        nonlocal looks
        looks += 1
        return held

    core.tasks.residency.paths = paths
    core.tasks.residency.in_use = lambda: set(paths())
    for number in range(20):
        adopt(core, "t", f"/dev/null/vllm_vlora.publish/tasks/t.safetensors@{number:032x}")
    looks = 0
    release(core)
    assert (looks, core.left) == (0, [])
    later = time.monotonic() + published.GRACE + 1
    monkeypatch.setattr(published, "time", SimpleNamespace(monotonic=lambda: later))
    release(core)
    assert looks == 2
    assert len(core.left) == len(core.discarded) == 19


def test_each_version_leaves_once_when_the_next_one_comes() -> None:
    core = Core()
    adopt(core, "t", OLD)
    core.in_use = {OLD}
    adopt(core, "t", NEW)
    assert adopt(core, "t", OTHER) == NEW
    assert list(core.tasks.unpublished) == [OLD]
    assert core.left == [NEW]
    core.in_use = set()
    release(core)
    assert core.left == [NEW, OLD]


def test_a_version_is_freed_after_the_answer_and_not_before() -> None:
    core = Core(process=True)
    adopt(core, "t", OLD)
    assert adopt(core, "t", NEW) == OLD
    assert core.left == []
    while not core.input_queue.empty():
        kind, requests = core.input_queue.get_nowait()
        assert (kind.name, requests) == ("ABORT", [])
        published.release_first(lambda *_: None)(core, requests)
    assert core.left == core.discarded == [OLD]
    assert core.tasks.looks is None


def test_a_version_stays_while_a_blend_of_it_is_asked_for_and_takes_its_blends_along() -> None:
    old, new = (TaskPath(MEMORY, "tasks/t.safetensors", c * 32) for c in "ab")
    tasks = {"t": old, "other": TaskPath(Path("/ck"), "tasks/other.safetensors", "c" * 32)}
    blend, alone = (
        str(blend_path(tasks, tuple(Term(task, Decimal("0.5")) for task in names)))
        for names in (("t", "other"), ("other",))
    )
    core = Core()
    core.held = [blend, alone]
    core.in_use = {blend}
    adopt(core, "t", str(old))
    adopt(core, "t", str(new))
    for needs in (core.in_use, core.awaited, core.pinned):
        needs.add(blend)
        release(core)
        assert core.left == []
        needs.clear()
    core.in_use = {alone}
    release(core)
    assert core.left == [str(old), blend]
    assert core.discarded == [str(old)]


def test_a_refused_offer_takes_nothing_away_that_is_served() -> None:
    core = Core()
    adopt(core, "t", OLD)
    withdraw(core, NEW)
    assert core.discarded == [NEW]
    assert core.tasks.published == {"t": OLD}
    assert core.tasks.unpublished == {}
    assert unpublish(core, "another") == ""


def test_who_was_interrupted_tells_it_again() -> None:
    core = Core()
    core.in_use = {OLD}
    adopt(core, "t", OLD)
    assert adopt(core, "t", NEW) == OLD
    since = dict(core.tasks.unpublished)
    assert since.keys() == {OLD}
    assert adopt(core, "t", NEW) == ""
    assert core.tasks.published == {"t": NEW}
    assert core.tasks.unpublished == since


def test_an_interrupt_between_two_lines_loses_no_version() -> None:
    """In an engine core of the caller's process it may fall anywhere."""

    class Interrupting(dict[str, str]):
        def __setitem__(self, task: str, path: str) -> None:
            raise KeyboardInterrupt

        def __delitem__(self, task: str) -> None:
            raise KeyboardInterrupt

        def pop(self, *args: Any) -> str:
            super().pop(*args)
            raise KeyboardInterrupt

    def interrupted(how: Callable[[Core], object]) -> None:
        core = Core()
        core.tasks.published = Interrupting({"t": OLD})
        with pytest.raises(KeyboardInterrupt):
            how(core)
        assert OLD in core.tasks.unpublished or OLD in core.tasks.published.values()

    interrupted(lambda core: adopt(core, "t", NEW))
    interrupted(lambda core: unpublish(core, "t"))


def test_an_engine_core_that_does_nothing_is_woken_to_look_again() -> None:
    core = Core(process=True)
    adopt(core, "t", OLD)
    core.in_use = {OLD}
    unpublish(core, "t")
    kind, requests = core.input_queue.get(timeout=10)
    assert (kind.name, requests) == ("ABORT", [])
    core.in_use = set()
    aborted: list[Any] = []
    published.release_first(lambda _, ids: aborted.append(ids))(core, requests)
    assert aborted == [[]]
    assert core.left == [OLD]
    with pytest.raises(queue.Empty):
        core.input_queue.get(timeout=2 * published._LOOK_AGAIN)

"""Format 4: very many tasks, named by an index, whose records are read one at a time."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited_world import NEW, OLD, WRITERS, World
from format2_world import write_world
from places import DATA as PINNED
from rich.console import Console
from safetensors.torch import load_file, save

from vllm_vlora.checkpoint import manifest
from vllm_vlora.checkpoint.card import model_card
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.hub import pull_checkpoint
from vllm_vlora.checkpoint.losses import Losses
from vllm_vlora.checkpoint.manifest import CONFIG_FILE, INDEX_FILE, RECORDS_FILE, TASKS_FILE
from vllm_vlora.checkpoint.own_files import checkpoint_files
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.report import report_contents
from vllm_vlora.checkpoint.successor import Successor, edited
from vllm_vlora.checkpoint.task_entry import entries, entry_of
from vllm_vlora.checkpoint.task_index import IndexedTasks, Usage
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.editing.rebuild_advice import rebuild_advice
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import CheckpointError, CheckpointVersionError, TaskNotFoundError
from vllm_vlora.plugin.identity import task_ids_to_int, task_paths
from vllm_vlora.plugin.memory import serving_obstacles
from vllm_vlora.tools.summary import print_tasks, summarize

DATA = PINNED / "format4"
OTHERS = ("format1", "format2", "format3", "format5")


@pytest.fixture
def indexed(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], None]:
    """Says from how many tasks on there is an index."""
    # What all worlds are copies of is made without one.
    World.at(tmp_path_factory.mktemp("world"))
    return lambda count: monkeypatch.setattr(manifest, "INDEXED_TASKS", count)


def copied(source: Path, target: Path) -> Checkpoint:
    """The same tasks, written anew."""
    with edited(source, target, force=True) as (old, folder):
        writer = Successor(folder, old)
        writer.keep_bases()
        for task_id in old.tasks:
            writer.copy_task(old, task_id)
        writer.finish_edited()
    return Checkpoint.open(target)


def edit_index(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change tensors of the index (``about`` decoded), and the digest that the manifest has of it."""
    tensors: dict[str, Any] = load_file(folder / INDEX_FILE)
    texts = ("about", "ids", "sources")
    tensors |= {name: json.loads(bytes(tensors[name].tolist())) for name in texts}
    edit(tensors)
    for name in texts:
        if name in tensors:
            data = json.dumps(tensors[name]).encode()
            tensors[name] = torch.tensor(list(data), dtype=torch.uint8)
    data = save(tensors)
    (folder / INDEX_FILE).write_bytes(data)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["tasks"] |= {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)}
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def read_all(folder: Path) -> None:
    opened = Checkpoint.open(folder)
    for task_id in opened.tasks:
        opened.load_task(task_id)


def fails(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        read_all(folder)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


# --- the same in both ways ------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_an_index_says_what_the_json_says(
    tmp_path: Path, indexed: Callable[[int], None], name: str
) -> None:
    old = Checkpoint.open(PINNED / name)
    indexed(1)
    new = copied(PINNED / name, tmp_path / "new")
    assert new.config.format_version == max(old.config.format_version, 4)
    assert not (tmp_path / "new" / TASKS_FILE).exists()
    assert list(new.tasks) == list(old.tasks)
    assert isinstance(new.tasks, IndexedTasks)
    assert dict(new.tasks) == old.tasks
    for task_id, record in old.tasks.items():
        assert new.digest(task_id) == old.digest(task_id)
        assert new.entry(task_id) == entry_of(record)
        assert new.lora_nbytes(task_id) == record.lora_nbytes
    assert new.usage() == old.usage()
    assert rebuild_advice(new) == rebuild_advice(old)
    said = [summarize(c, "c") for c in (old, new)]
    differ = {key for key in said[0] if said[0][key] != said[1][key]}
    assert differ - {"format_version"} == {"content"}
    assert list(said[0]["tasks"][0]) == list(said[1]["tasks"][0])
    for value in ("max_rank", "original_nbytes", "nbytes", "ratio", "basis_digest"):
        assert getattr(new, value) == getattr(old, value)
    assert Losses.of(new.tasks, new.modules) == Losses.of(old.tasks, old.modules)
    reports = [report_contents(Path(), c.tasks, c.modules, c.basis_nbytes) for c in (old, new)]
    assert reports[0] == reports[1]
    assert validate(tmp_path / "new") == []
    # And back again, byte for byte.
    indexed(sys.maxsize)
    copied(tmp_path / "new", tmp_path / "back")
    assert (tmp_path / "back" / TASKS_FILE).read_bytes() == (
        PINNED / name / TASKS_FILE
    ).read_bytes()


@pytest.mark.parametrize("name", OTHERS)
def test_paths_and_numbers_are_the_same(
    tmp_path: Path, indexed: Callable[[int], None], name: str
) -> None:
    indexed(1)
    new = copied(PINNED / name, tmp_path / "new")
    old = task_paths(Checkpoint.open(PINNED / name))
    found = task_paths(new)
    assert task_ids_to_int(found) == task_ids_to_int(old)
    assert {task: (path.file, path.digest) for task, path in found.items()} == {
        task: (path.file, path.digest) for task, path in old.items()
    }


def test_weights_of_every_kind_read_back(tmp_path: Path, indexed: Callable[[int], None]) -> None:
    indexed(1)
    tasks = write_world(tmp_path / "c", basis="nf4")
    opened = Checkpoint.open(tmp_path / "c")
    assert opened.config.format_version == 4
    for task_id, modules in tasks.items():
        stored = opened.load_task(task_id)
        assert list(stored.modules) == list(modules)
        for name, want in modules.items():
            assert stored.modules[name].error == want.error
            assert stored.modules[name].rank == want.rank
    assert validate(tmp_path / "c") == []


def test_few_tasks_have_no_index(tmp_path: Path, indexed: Callable[[int], None]) -> None:
    indexed(3)
    copied(PINNED / "format3", tmp_path / "two")
    assert Checkpoint.open(tmp_path / "two").config.format_version == 3
    assert not (tmp_path / "two" / INDEX_FILE).exists()
    assert not (tmp_path / "two" / RECORDS_FILE).exists()


@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_order_in_which_the_index_begins_leaves_no_trace(
    tmp_path: Path, indexed: Callable[[int], None], first: int
) -> None:
    """Tasks that waited in memory are written as those that come after them."""
    indexed(1)
    write_world(tmp_path / "a")
    indexed(first)
    write_world(tmp_path / "b")
    for name in (INDEX_FILE, RECORDS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_equal_segments_and_configs_are_stored_once(
    tmp_path: Path, indexed: Callable[[int], None]
) -> None:
    indexed(1)
    tasks = copied(PINNED / "format3", tmp_path / "c").tasks
    assert isinstance(tasks, IndexedTasks)
    # One has another scale and another config.
    assert len({*tasks.parts("head"), *tasks.parts("bare")}) == 6
    world = World.at(tmp_path / "world")
    opened = copied(world.checkpoint, tmp_path / "same")
    assert isinstance(opened.tasks, IndexedTasks)
    config = {opened.tasks.parts(task).config for task in opened.tasks}
    assert len(config) < len(opened.tasks)


# --- only what is asked for -----------------------------------------------------------------------


def test_opening_and_listing_read_no_record(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "c")
    data = (tmp_path / "c" / RECORDS_FILE).read_bytes()
    (tmp_path / "c" / RECORDS_FILE).write_bytes(bytes(len(data)))
    opened = Checkpoint.open(tmp_path / "c")
    _ = opened.max_rank, opened.nbytes, opened.ratio, opened.content_digest, opened.usage()
    assert [entry.error for _, entry in entries(opened.tasks)]
    assert len(task_ids_to_int(task_paths(opened))) == len(opened.tasks)
    with pytest.raises(CheckpointError, match="SHA-256 of part"):
        opened.record(next(iter(opened.tasks)))


def test_a_record_is_decoded_once_and_not_kept_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: Callable[[int], None]
) -> None:
    monkeypatch.setattr("vllm_vlora.checkpoint.task_index._KEPT", 2)
    opened = Checkpoint.open(DATA)
    ids = list(opened.tasks)
    assert len(ids) > 2
    assert opened.record(ids[0]) is opened.record(ids[0])
    first = opened.record(ids[0])
    for task_id in ids[1:]:
        opened.record(task_id)
    assert opened.record(ids[0]) is not first
    assert opened.record(ids[0]) == first


def test_records_are_read_after_the_folder_was_replaced(
    tmp_path: Path, indexed: Callable[[int], None]
) -> None:
    world = World.at(tmp_path)
    indexed(1)
    world.compress()()
    opened = Checkpoint.open(world.checkpoint)
    before = dict(Checkpoint.open(world.checkpoint).tasks)
    world.remove(OLD[0])()
    assert opened.was_replaced
    assert dict(opened.tasks) == before


def test_files_are_closed_with_the_checkpoint(tmp_path: Path) -> None:
    held = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Checkpoint.open(DATA)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= held + 1


def test_another_process_may_have_it() -> None:
    opened = Checkpoint.open(DATA)
    _ = opened.record("bits")
    again = pickle.loads(pickle.dumps(opened))
    assert dict(again.tasks) == dict(opened.tasks)
    assert again.content_digest == opened.content_digest


def test_records_are_read_by_several_threads() -> None:
    opened, want = Checkpoint.open(DATA), dict(Checkpoint.open(DATA).tasks)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(opened.record, [*want] * 50))
    assert found == [*want.values()] * 50


def test_a_task_that_is_not_there(tmp_path: Path) -> None:
    opened = Checkpoint.open(DATA)
    for ask in (opened.record, opened.entry, opened.digest, opened.lora_nbytes):
        with pytest.raises(TaskNotFoundError, match="it has: "):
            ask("nobody")
    assert "nobody" not in opened.tasks
    assert opened.tasks.get("nobody") is None


# --- everything that writes and reads -------------------------------------------------------------


@pytest.mark.parametrize("before", [1, 100])
@pytest.mark.parametrize("command", WRITERS)
def test_every_command_that_writes(
    tmp_path: Path, indexed: Callable[[int], None], command: str, before: int
) -> None:
    """From JSON to an index, and from an index to one, with the result of JSON to JSON."""
    runs = {}
    for first, second in ((before, 1), (100, 100)):
        world = World.at(tmp_path / f"{first}-{second}")
        indexed(first)
        copied(world.checkpoint, world.place / "again")
        shutil.rmtree(world.checkpoint)
        (world.place / "again").rename(world.checkpoint)
        if first == 1:
            copied(world.root / "published", world.root / "other")
            shutil.rmtree(world.root / "published")
            (world.root / "other").rename(world.root / "published")
        indexed(second)
        WRITERS[command](world)()
        assert validate(world.checkpoint) == []
        runs[second] = Checkpoint.open(world.checkpoint)
    # What is pulled comes as it is.
    version = 4 if command != "pull" or before == 1 else 1
    assert runs[1].config.format_version == version
    assert dict(runs[1].tasks) == dict(runs[100].tasks)
    assert [runs[1].digest(t) for t in runs[1].tasks] == [
        runs[100].digest(t) for t in runs[1].tasks
    ]
    names = {path.name for path in runs[1].path.iterdir()}
    assert (INDEX_FILE in names, TASKS_FILE in names) == (version == 4, version != 4)


def test_a_replaced_task_keeps_its_place(tmp_path: Path, indexed: Callable[[int], None]) -> None:
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.editing.adding import add_adapters

    indexed(1)
    world = World.at(tmp_path)
    world.compress()()
    before = Checkpoint.open(world.checkpoint)
    adapter = open_adapter(world.adapter(NEW[0]))
    add_adapters(world.checkpoint, {OLD[1]: adapter}, replace_tasks=True)
    after = Checkpoint.open(world.checkpoint)
    assert list(after.tasks) == list(OLD)
    changed = [task for task in OLD if before.digest(task) != after.digest(task)]
    assert changed == [OLD[1]]
    assert validate(world.checkpoint) == []


def test_a_basis_that_grows(tmp_path: Path, indexed: Callable[[int], None]) -> None:
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.editing.adding import add_adapters
    from vllm_vlora.editing.options import AddOptions

    tasks = {}
    for count in (1, 100):
        indexed(count)
        world = World.at(tmp_path / str(count))
        new = {task: open_adapter(world.adapter(task)) for task in NEW}
        add_adapters(world.checkpoint, new, AddOptions(max_error=1e-2), expand=True)
        assert validate(world.checkpoint) == []
        opened = Checkpoint.open(world.checkpoint)
        tasks[count] = dict(opened.tasks), [opened.digest(task) for task in opened.tasks]
    assert tasks[1] == tasks[100]
    # Again, from an index whose segments name rows.
    indexed(1)
    world = World(tmp_path / "1")
    world.remove(NEW[0])()
    assert validate(world.checkpoint) == []


@pytest.mark.parametrize("count", [1, 100])
def test_files_that_stay_are_not_written_again(
    tmp_path: Path, indexed: Callable[[int], None], count: int
) -> None:
    """In place they are the same files; a copy elsewhere has its own."""
    indexed(count)
    world = World.at(tmp_path)
    world.compress()()
    file = Path(Checkpoint.open(world.checkpoint).record(OLD[1]).file)
    before = (world.checkpoint / file).stat()
    remove_tasks(world.checkpoint, [OLD[2]], output=tmp_path / "copy")
    assert (tmp_path / "copy" / file).stat().st_ino != before.st_ino
    world.remove(OLD[0])()
    after = (world.checkpoint / file).stat()
    assert (after.st_ino, after.st_nlink) == (before.st_ino, 1)
    # One that is damaged is refused before.
    (world.checkpoint / file).write_bytes(b"x")
    with pytest.raises(CheckpointError, match="the manifest says"):
        world.add(NEW[0])()
    assert OLD[3] in Checkpoint.open(world.checkpoint).tasks


def test_attachments_travel_with_their_tasks(
    tmp_path: Path, indexed: Callable[[int], None]
) -> None:
    indexed(1)
    world = World.at(tmp_path)
    file = world.adapter(OLD[0]) / "tokenizer_config.json"
    file.write_text('{"chat_template": "x"}')
    world.compress()()
    world.add(NEW[0])()
    pulled = pull_checkpoint(str(world.checkpoint), tmp_path / "pulled")
    assert list(pulled.attachments) == [OLD[0]]
    folder = export_task(pulled, OLD[0], tmp_path / "out")
    assert (folder / "tokenizer_config.json").read_bytes() == file.read_bytes()
    assert validate(pulled.path) == []


def test_pinned_content_is_another_with_another_record(
    tmp_path: Path, indexed: Callable[[int], None]
) -> None:
    indexed(1)
    first = copied(PINNED / "format1", tmp_path / "first")
    again = copied(PINNED / "format1", tmp_path / "again")
    assert first.content_digest == again.content_digest
    Checkpoint.open(f"{first.path}@sha256:{first.content_digest}")
    edit_index(first.path, lambda index: index["error"].mul_(2))
    with pytest.raises(CheckpointError, match="its content is"):
        Checkpoint.open(f"{first.path}@sha256:{again.content_digest}")


@pytest.mark.parametrize("damaged", [None, INDEX_FILE, RECORDS_FILE, CONFIG_FILE])
def test_its_files_are_known_for_its_own(tmp_path: Path, damaged: str | None) -> None:
    shutil.copytree(DATA, tmp_path / "c")
    (tmp_path / "c" / "LICENSE").write_text("")
    (tmp_path / "c" / "tasks" / "foreign.txt").write_text("")
    if damaged == CONFIG_FILE:
        path = tmp_path / "c" / CONFIG_FILE
        path.write_text(path.read_text().replace('"format_version": 4', '"format_version": 6'))
    elif damaged:
        (tmp_path / "c" / damaged).write_bytes(b"{}")
    own = checkpoint_files(tmp_path / "c")
    assert own is not None
    there = {
        p.relative_to(tmp_path / "c").as_posix() for p in (tmp_path / "c").rglob("*") if p.is_file()
    }
    assert there - own == {"LICENSE", "tasks/foreign.txt"}


# --- damage ---------------------------------------------------------------------------------------


def _about(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["about"].update(changes)


def _set(name: str, value: Any, place: Any = 0) -> Callable[[dict[str, Any]], None]:
    def edit(index: dict[str, Any]) -> None:
        index[name][place] = value

    return edit


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda index: index.pop(name)


def _usage(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["about"]["usage"][0].update(changes)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no tensor": (_drop("digest"), "'digest' is missing"),
    "no ids": (_drop("ids"), "'ids' is missing"),
    "another tensor": (lambda index: index.update(x=torch.ones(2)), "unexpected tensor 'x'"),
    "another dtype": (lambda index: index.update(error=index["error"].float()), "of another kind"),
    "too few rows": (lambda index: index.update(error=index["error"][1:]), "not a row for each"),
    "too few parts": (
        lambda index: index.update(part_sha256=index["part_sha256"][1:]), "not a row for each"
    ),
    "a scalar": (lambda index: index.update(error=torch.tensor(1.0).double()), "of another kind"),
    "an id twice": (lambda index: index["ids"].__setitem__(0, index["ids"][1]), "stands twice"),
    "an id of nothing": (_set("ids", ""), "empty"),
    "an id with a line break": (_set("ids", "a\nb"), "control character"),
    "a long id": (_set("ids", "x" * 257), "257 characters"),
    "no source": (lambda index: index["sources"].pop(), "has no source"),
    "ids of numbers": (_set("ids", 5), "ids: "),
    "another part": (_set("parts", 99, (0, 1)), "impossible numbers in 'parts'"),
    "a part before the first": (_set("parts", -1, (0, 0)), "impossible numbers in 'parts'"),
    "a word that is none": (_set("format", 200), "impossible numbers in 'format'"),
    "half a truth": (_set("no_update", 2), "impossible numbers in 'no_update'"),
    "less than nothing": (_set("nbytes", -1), "impossible numbers in 'nbytes'"),
    "no number": (_set("error", float("nan")), "impossible numbers in 'error'"),
    "a part of less than nothing": (_set("part_nbytes", -1), "not as large"),
    "a part too large": (_set("part_nbytes", 2**31 - 1), "not as large"),
    "foreign records": (_about(records={"file": "x", "sha256": "", "nbytes": 0}), ""),
    "more than is known": (_about(x=1), "about: "),
    "usage of no module": (_usage(module=99), "module 99"),
    "usage of no format": (_usage(format="x"), "unknown number format"),
    "usage of no rank": (_usage(rank=0), "rank must be positive"),
    "another digest": (_set("digest", 0), "not what its record says"),
    "another rank": (_set("max_rank", 500), "not what its record says"),
    "a smaller rank": (_set("min_rank", 0), "not what its record says"),
    "other weights": (_set("lora_nbytes", 3), "not what its record says"),
    "heads that are not": (_set("carries", 1), "not what its record says"),
    "a module less lost": (_set("lost_modules", 7), "not what its record says"),
    "another file": (_set("sha256", 0), "not what its record says"),
    "another's segments": (lambda i: i["parts"].__setitem__((0, 1), i["parts"][2, 1]), ""),
    "a config as segments": (lambda i: i["parts"].__setitem__((0, 1), i["parts"][0, 2]), "part "),
    "segments as a config": (lambda i: i["parts"].__setitem__((0, 2), i["parts"][0, 1]), "part "),
    "a config of its own as all": (lambda i: i["parts"].__setitem__((0, 0), i["parts"][0, 2]), "part "),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_index_that_contradicts_is_named(tmp_path: Path, damage: str) -> None:
    edit, words = DAMAGE[damage]
    shutil.copytree(DATA, tmp_path / "c")
    edit_index(tmp_path / "c", edit)
    fails(tmp_path / "c", words)
    assert validate(tmp_path / "c")


@pytest.mark.parametrize("file", [INDEX_FILE, RECORDS_FILE])
@pytest.mark.parametrize("how", ["missing", "cut", "changed", "a folder", "a link out", "a pipe"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, how: str) -> None:
    shutil.copytree(DATA, tmp_path / "c")
    path = tmp_path / "c" / file
    data = path.read_bytes()
    path.unlink()
    if how == "cut":
        path.write_bytes(data[:-1])
    elif how == "changed":
        path.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
    elif how == "a folder":
        path.mkdir()
    elif how == "a link out":
        (tmp_path / "outside").write_bytes(data)
        path.symlink_to(tmp_path / "outside")
    elif how == "a pipe":
        os.mkfifo(path)
    fails(tmp_path / "c", file)
    assert validate(tmp_path / "c")


def test_what_lies_between_parts_is_found(tmp_path: Path) -> None:
    """A part that no task has: nobody reads it, but it is not what was written."""
    shutil.copytree(DATA, tmp_path / "c")

    def edit(index: dict[str, Any]) -> None:
        more = torch.zeros(1, 32, dtype=torch.uint8)
        index["part_sha256"] = torch.cat([index["part_sha256"], more])
        index["part_nbytes"] = torch.cat([index["part_nbytes"], torch.tensor([3]).int()])
        index["about"]["records"]["nbytes"] += 3

    edit_index(tmp_path / "c", edit)
    with (tmp_path / "c" / RECORDS_FILE).open("ab") as stream:
        stream.write(b"abc")
    read_all(tmp_path / "c")
    assert any(
        "SHA-256 differs from the index's" in problem for problem in validate(tmp_path / "c")
    )


def test_usage_that_leaves_something_out_is_found(tmp_path: Path) -> None:
    shutil.copytree(DATA, tmp_path / "c")
    edit_index(tmp_path / "c", lambda index: index["about"]["usage"].pop())
    read_all(tmp_path / "c")
    assert any("the modules' use" in problem for problem in validate(tmp_path / "c"))


def _record_part(number: int, edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Writes a part of the first task anew, with all digests above it."""

    def change(folder: Path) -> None:
        tasks = Checkpoint.open(folder).tasks
        assert isinstance(tasks, IndexedTasks)
        place = tasks.parts(next(iter(tasks)))[number]
        parts = [tasks.part(i) for i in range(max(max(tasks.parts(task)) for task in tasks) + 1)]
        parts[place] = json.dumps(edit(json.loads(parts[place]))).encode()
        data = b"".join(parts)
        (folder / RECORDS_FILE).write_bytes(data)

        def entry(index: dict[str, Any]) -> None:
            index["part_nbytes"][place] = len(parts[place])
            digest = hashlib.sha256(parts[place]).digest()
            index["part_sha256"][place] = torch.tensor(list(digest), dtype=torch.uint8)
            index["about"]["records"] |= {
                "nbytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }

        edit_index(folder, entry)

    return change


PARTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "an error too few": (
        _record_part(0, lambda own: own | {"errors": own["errors"][1:]}),
        "one error",
    ),
    "an error that is none": (_record_part(0, lambda own: own | {"errors": ["x"]}), "part "),
    "more than is known": (_record_part(0, lambda own: own | {"x": 1}), "part "),
    "an error of all": (_record_part(1, lambda s: [s[0] | {"error": 0.5}, *s[1:]]), "a task's own"),
    "a module twice": (_record_part(1, lambda s: [*s, s[0]]), "stands twice"),
    "another scale": (_record_part(1, lambda s: [s[0] | {"scale": 9.0}, *s[1:]]), "record says"),
    "an unknown field": (_record_part(1, lambda s: [s[0] | {"x": 3}, *s[1:]]), "part "),
    "a config of no config": (_record_part(2, lambda config: [config]), "part "),
    "a rank of words": (_record_part(2, lambda config: config | {"r": "x"}), "adapter_config"),
}


@pytest.mark.parametrize("damage", PARTS)
def test_a_record_that_contradicts_is_named(tmp_path: Path, damage: str) -> None:
    change, words = PARTS[damage]
    shutil.copytree(DATA, tmp_path / "c")
    change(tmp_path / "c")
    fails(tmp_path / "c", words)
    assert validate(tmp_path / "c")


@pytest.mark.parametrize("version", [1, 3])
def test_an_index_in_an_older_format_is_an_error(tmp_path: Path, version: int) -> None:
    shutil.copytree(DATA, tmp_path / "c")
    path = tmp_path / "c" / CONFIG_FILE
    path.write_text(path.read_text().replace('"format_version": 4', f'"format_version": {version}'))
    fails(tmp_path / "c")


def test_older_readers_say_that_it_is_newer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "FORMAT_VERSION", 3)
    with pytest.raises(CheckpointVersionError, match="4 is newer than this vllm-vlora reads"):
        Checkpoint.open(DATA)


# --- the pinned example ---------------------------------------------------------------------------


def test_a_checkpoint_of_format_4_reads_to_the_same_values_for_ever() -> None:
    opened, old = Checkpoint.open(DATA), Checkpoint.open(PINNED / "format2")
    assert opened.config.format_version == 4
    assert validate(DATA) == []
    assert dict(opened.tasks) == dict(old.tasks)
    assert [opened.digest(task) for task in opened.tasks] == [
        old.digest(task) for task in old.tasks
    ]


def test_the_writer_still_writes_format_4(tmp_path: Path, indexed: Callable[[int], None]) -> None:
    """Byte for byte, but for the version of the program in the manifest."""
    indexed(1)
    copied(PINNED / "format2", tmp_path / "c")
    for file in sorted(p.relative_to(DATA) for p in DATA.rglob("*") if p.is_file()):
        old, new = DATA / file, tmp_path / "c" / file
        if file.name == CONFIG_FILE:
            configs = [json.loads(path.read_text()) | {"created_by": ""} for path in (old, new)]
            assert configs[0] == configs[1]
        else:
            assert old.read_bytes() == new.read_bytes(), file


# --- how much there is to use ---------------------------------------------------------------------


def test_usage_is_the_greatest_of_its_kind() -> None:
    segment = Checkpoint.open(PINNED / "format2").record("bits").segments[0]
    from msgspec.structs import replace

    small = replace(segment, rank=1, bits=(1, 0, 0), scale=2.0, error=0.3)
    other = replace(segment, bits=None)
    [wide, narrow] = Usage([small, segment, other, small]).segments()
    assert (wide, narrow) == (replace(other, scale=1.0), replace(segment, scale=1.0))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As many tasks as have an index, without weights."""
    from vllm_vlora.checkpoint.manifest import INDEXED_TASKS, TaskRecord, task_file
    from vllm_vlora.checkpoint.writer import CheckpointWriter
    from vllm_vlora.representations.spec import Segment

    folder = tmp_path_factory.mktemp("many")
    writer = CheckpointWriter(folder, None)
    for place in range(3):
        writer.add_module(f"m{place}", 8, 8)
    for number in range(INDEXED_TASKS):
        task_id = f"Task/{number}"
        segments = [Segment(p, "private", "bfloat16", 1 + number % 4, error=0.1) for p in range(3)]
        writer.tasks.add(task_id, TaskRecord(task_file(task_id), f"{number:064x}", 100 + number,
                                             1000, 0.1, segments, {"r": 4}, f"s{number}"))  # fmt: skip
    writer.finish("")
    yield folder
    shutil.rmtree(folder)


def test_cards_and_tables_name_the_first_of_very_many(
    many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_vlora.checkpoint.card._LISTED_TASKS", 2046)
    monkeypatch.setattr("vllm_vlora.tools.summary._SHOWN_TASKS", 2046)
    opened = Checkpoint.open(many)
    card = model_card(None, report_contents(many, opened.tasks, opened.modules, 0))
    assert "# 2048 LoRA adapters" in card
    assert card.count("\n| Task/") == 2046
    assert "And 2 more: `vllm-vlora info CHECKPOINT` lists all." in card
    shown = io.StringIO()
    print_tasks(Console(file=shown, width=120), summarize(opened, str(many)))
    assert shown.getvalue().count("Task/") == 2046
    assert "and 2 more, with --json" in shown.getvalue()


def test_lists_read_no_record_of_its_own(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes over all tasks reads what they share, and of none what is its own."""

    def refuse(tasks: IndexedTasks, task_id: str) -> None:
        raise AssertionError(f"{task_id} was read")

    monkeypatch.setattr(IndexedTasks, "_read_record", refuse)
    opened = Checkpoint.open(many)
    assert len(summarize(opened, str(many))["tasks"]) == manifest.INDEXED_TASKS
    report_contents(many, opened.tasks, opened.modules, 0)
    assert not rebuild_advice(opened).likely
    assert serving_obstacles(opened) == {}
    assert [len(tasks) for _, tasks in opened.alike()] == [512] * 4


def test_so_many_tasks_have_an_index(many: Path) -> None:
    opened = Checkpoint.open(many)
    assert opened.config.format_version == 4
    assert len(opened.tasks) == manifest.INDEXED_TASKS
    assert opened.nbytes == sum(100 + n for n in range(manifest.INDEXED_TASKS))
    record = opened.record("Task/2001")
    assert (record.nbytes, record.source, record.segments[2].rank) == (2101, "s2001", 2)
    assert [s.rank for s in opened.usage()] == [4, 4, 4]
    # Four lists of segments and one config.
    assert isinstance(opened.tasks, IndexedTasks)
    parts = np.array([opened.tasks.parts(task) for task in opened.tasks])
    assert [len(set(column)) for column in parts.T] == [manifest.INDEXED_TASKS, 4, 1]

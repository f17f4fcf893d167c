"""``force`` replaces what this package wrote, and nothing else, wherever it lies."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attack_children import DONE, at_once
from edited_world import NEW, OLD, WRITERS, World

from vllm_vlora import atomic, places
from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint.attachments import ATTACHMENTS_FILE
from vllm_vlora.checkpoint.export import export_task
from vllm_vlora.checkpoint.hub import pull_checkpoint
from vllm_vlora.checkpoint.manifest import CONFIG_FILE, TASKS_FILE
from vllm_vlora.checkpoint.own_files import checkpoint_files
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.router_files import ROUTER_FILE
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import compress
from vllm_vlora.editing.adding import add_adapters
from vllm_vlora.editing.options import AddOptions
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import OutputError

every_writer = pytest.mark.parametrize("writer", WRITERS)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World.at(tmp_path)


def everything(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@every_writer
def test_what_no_manifest_names_stays(world: World, writer: str) -> None:
    ckpt = world.checkpoint
    (ckpt / "notes").mkdir()
    (ckpt / "notes" / "todo.txt").write_text("mine")
    (ckpt / "tasks" / "mine.txt").write_text("mine too")
    shutil.copytree(world.adapter("task5"), ckpt / "stray")
    before = {name: data for name, data in everything(ckpt).items() if name not in own(ckpt)}
    assert len(before) > 4
    WRITERS[writer](world)()
    after = everything(ckpt)
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) <= own(ckpt)
    assert validate(ckpt) == []
    assert os.listdir(world.place) == ["ckpt"]


def own(ckpt: Path) -> set[str]:
    found = checkpoint_files(ckpt)
    assert found is not None
    return found


def test_what_an_adapters_config_calls_a_file_stays(world: World) -> None:
    config = world.adapter("task4") / "adapter_config.json"
    said = {"file": "LICENSE", "x": {"file": "eval/results.json"}, "y": {"file": "tasks/mine"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_mapping": said}))
    add_adapters(world.checkpoint, {"task4": open_adapter(config.parent)}, AddOptions(ratio=1.0))
    mine = {"LICENSE": b"mine", "eval/results.json": b"{}", "tasks/mine": b"my own"}
    for name, data in mine.items():
        (world.checkpoint / name).parent.mkdir(exist_ok=True)
        (world.checkpoint / name).write_bytes(data)
    remove_tasks(world.checkpoint, ["task0"])
    assert {name: (world.checkpoint / name).read_bytes() for name in mine} == mine


@pytest.mark.parametrize("file", [CONFIG_FILE, ATTACHMENTS_FILE, ROUTER_FILE])
def test_what_a_received_folder_calls_its_file_is_not(file: str, world: World) -> None:
    path = world.checkpoint / file
    content = json.loads(path.read_text()) if path.exists() else {"version": 1}
    named = [{"file": name, "sha256": "0" * 64, "nbytes": 9} for name in ("LICENSE", "a/b")]
    path.write_text(json.dumps({**content, "basis": named}))
    assert not {"LICENSE", "a/b"} & own(world.checkpoint)


def test_a_stray_manifest_makes_no_checkpoint(world: World) -> None:
    home = world.root / "home"
    shutil.copytree(world.adapter("task0"), home / "precious")
    shutil.copy(world.checkpoint / CONFIG_FILE, home)
    before = everything(home)
    with pytest.raises(OutputError, match="did not write"):
        pull_checkpoint(str(world.checkpoint), home, force=True)
    assert everything(home) == before


@pytest.mark.parametrize("broken", [CONFIG_FILE, TASKS_FILE])
def test_a_damaged_checkpoint_is_replaced_whole(world: World, broken: str) -> None:
    data = {"format_version": 99} if broken == CONFIG_FILE else []
    (world.checkpoint / broken).write_text(json.dumps(data))
    world.pull()()
    assert set(everything(world.checkpoint)) <= own(world.checkpoint) | {"LICENSE"}
    (world.checkpoint / TASKS_FILE).unlink()
    world.compress()()
    assert set(everything(world.checkpoint)) <= own(world.checkpoint) | {"LICENSE"}
    assert validate(world.checkpoint) == []


def test_an_input_inside_the_output_is_refused(world: World) -> None:
    inside = world.checkpoint / "adapters" / "new"
    shutil.copytree(world.adapter("task4"), inside)
    before = everything(world.root)
    adapters = {"new": open_adapter(inside)}
    attempts: list[Callable[[], object]] = [
        lambda: compress(adapters, world.checkpoint, CompressOptions(), force=True),
        lambda: add_adapters(world.checkpoint, adapters),
        lambda: pull_checkpoint(str(world.checkpoint), world.checkpoint, force=True),
        lambda: pull_checkpoint(str(world.checkpoint), world.place, force=True),
        lambda: remove_tasks(world.checkpoint, ["task0"], output=world.place),
        lambda: export_task(Checkpoint.open(world.checkpoint), "task0", world.place),
    ]
    for attempt in attempts:
        with pytest.raises(OutputError, match=r"the output .* (is|holds) .*, which is read"):
            attempt()
    assert everything(world.root) == before


def test_a_link_to_the_input_does_not_hide_it(world: World) -> None:
    (world.root / "link").symlink_to(world.adapter("task0").parent)
    with pytest.raises(OutputError, match="holds"):
        compress({"a": open_adapter(world.adapter("task0"))}, world.root / "link", force=True)


# --- places where no folder can be replaced -------------------------------------------------------


def unmovable(number: int) -> Callable[[object, object], None]:
    """``os.rename`` on a file system that says this of a checkpoint's folder."""
    rename = os.rename

    def refuse(source: str | Path, target: str | Path) -> None:
        if Path(source).name == "ckpt":
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        rename(source, target)

    return refuse


@every_writer
@pytest.mark.parametrize(
    ("number", "said"),
    [(errno.EXDEV, "container image's layer"), (errno.EBUSY, "busy"), (errno.EPERM, "permitted")],
)
def test_a_folder_that_cannot_be_moved_is_found_before_the_work(
    world: World, monkeypatch: pytest.MonkeyPatch, writer: str, number: int, said: str
) -> None:
    before = everything(world.root)
    run = WRITERS[writer](world)
    monkeypatch.setattr(places, "_file_system", lambda path: "overlay")
    monkeypatch.setattr(os, "rename", unmovable(number))
    monkeypatch.setattr(atomic, "_finish_tree", pytest.fail)
    with pytest.raises(OutputError, match=rf"{said}.*write to another folder"):
        run()
    assert everything(world.root) == before
    assert os.listdir(world.place) == ["ckpt"]


def test_a_rename_is_tried_only_where_it_surely_fails(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_file_system", lambda path: "fuse.s3fs")
    monkeypatch.setattr(os, "rename", unmovable(errno.EXDEV))
    world.remove("task0")()
    assert list(Checkpoint.open(world.checkpoint).tasks) == list(OLD[1:])


def test_the_trial_moves_nothing(world: World) -> None:
    sibling = world.place / "sibling"
    (sibling / "in").mkdir(parents=True)
    before = everything(world.place)
    places.check_movable(world.checkpoint, sibling)
    assert everything(world.place) == before
    assert (sibling / "in").is_dir()
    assert places._file_system(world.checkpoint) != ""


@pytest.fixture
def may_mount(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """``mount(arguments)`` on this machine, undone at the end."""
    mounted: list[str] = []

    def mount(*arguments: str) -> None:
        done = subprocess.run(["mount", *arguments], capture_output=True, check=False)
        if done.returncode:
            pytest.skip(f"may not mount here: {done.stderr.decode().strip()}")
        mounted.append(arguments[-1])

    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    yield mount
    for path in reversed(mounted):
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("kind", ["bind", "tmpfs"])
def test_a_mount_point_is_refused_before_the_work(
    world: World,
    may_mount: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    filled: bool,
) -> None:
    volume = world.root / "volume"
    volume.mkdir()
    if kind == "bind":
        (world.root / "elsewhere").mkdir()
        may_mount("--bind", str(world.root / "elsewhere"), str(volume))
    else:
        may_mount("-t", "tmpfs", "tmpfs", str(volume))
    if filled:
        shutil.copytree(world.checkpoint, volume, dirs_exist_ok=True)
    before = everything(volume)
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "_finish_tree", pytest.fail)
        with pytest.raises(OutputError, match="is a mount point"):
            pull_checkpoint(str(world.root / "published"), volume, force=True)
    assert everything(volume) == before
    # In the volume all is well.
    pull_checkpoint(str(world.root / "published"), volume / "ckpt", force=True)
    remove_tasks(volume / "ckpt", [NEW[0]])
    assert validate(volume / "ckpt") == []


def test_a_layer_of_a_container_image(
    world: World, may_mount: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {name: world.root / name for name in ("disk", "merged")}
    for path in parts.values():
        path.mkdir()
    may_mount("-t", "tmpfs", "tmpfs", str(parts["disk"]))
    upper, scratch = parts["disk"] / "upper", parts["disk"] / "work"
    upper.mkdir()
    scratch.mkdir()
    options = f"lowerdir={world.place},upperdir={upper},workdir={scratch}"
    may_mount("-t", "overlay", "overlay", "-o", options, str(parts["merged"]))
    ckpt = parts["merged"] / "ckpt"
    before = everything(ckpt)
    with monkeypatch.context() as patched:
        patched.setattr(atomic, "_finish_tree", pytest.fail)
        with pytest.raises(OutputError, match="container image's layer"):
            remove_tasks(ckpt, ["task0"])
    assert everything(ckpt) == before
    # Another output is what the message says, and what is written there can be replaced.
    remove_tasks(ckpt, ["task0"], output=parts["merged"] / "less")
    remove_tasks(parts["merged"] / "less", ["task1"])
    assert list(Checkpoint.open(parts["merged"] / "less").tasks) == list(OLD[2:])


@every_writer
def test_without_an_exchange_two_renames_do(
    world: World, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    class NoExchange:
        def __init__(self, *args: object, **kwargs: object) -> None: ...

        def renameat2(self, *args: object) -> int:
            ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", NoExchange)
    run = WRITERS[writer](world)
    assert at_once([run]) == [DONE]
    assert validate(world.checkpoint) == []
    assert os.listdir(world.place) == ["ckpt"]


# --- basis files of other makes -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "bases/deep/one", "tasks/x.safetensors"])
def test_a_basis_file_of_any_name_survives_every_writer(world: World, name: str) -> None:
    for writer in ("remove", "pull"):
        world.refresh()
        rename_basis(world.checkpoint, name)
        assert validate(world.checkpoint) == []
        other = world.root / "pulled"
        pull_checkpoint(str(world.checkpoint), other, force=True)
        assert everything(other) == {
            file: data
            for file, data in everything(world.checkpoint).items()
            if file in own(world.checkpoint) or file == "LICENSE"
        }
        WRITERS[writer](world)()
        assert validate(world.checkpoint) == [], writer
        assert set(everything(world.checkpoint)) <= own(world.checkpoint) | {"LICENSE"}, writer


def rename_basis(ckpt: Path, name: str) -> None:
    config = json.loads((ckpt / CONFIG_FILE).read_bytes())
    (basis,) = config["basis"]
    (ckpt / name).parent.mkdir(parents=True, exist_ok=True)
    (ckpt / basis["file"]).rename(ckpt / name)
    basis["file"] = name
    (ckpt / CONFIG_FILE).write_text(json.dumps(config))

"""The router beside a checkpoint's weights: attached, kept, carried, refused where it is damaged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edited_world import World
from routers import network
from safetensors.torch import load_file, save_file

from vllm_vlora.atomic import publish_folder
from vllm_vlora.checkpoint.hub import _files, pull_checkpoint
from vllm_vlora.checkpoint.manifest import hash_file
from vllm_vlora.checkpoint.own_files import checkpoint_files
from vllm_vlora.checkpoint.pinning import pinned
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.router_files import (
    ROUTER_FILE,
    read_router,
    read_router_weights,
    router_fit,
    weights_file,
)
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.editing.routing import attach_router, remove_router
from vllm_vlora.errors import CheckpointError, OptionError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return World.at(tmp_path / "world").checkpoint


@pytest.fixture
def routed(checkpoint: Path) -> Path:
    tasks = list(Checkpoint.open(checkpoint).tasks)
    attach_router(checkpoint, tasks, network(len(tasks)))
    return checkpoint


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith("router")}


def test_a_router_comes_back_as_it_was_attached(checkpoint: Path) -> None:
    before = Checkpoint.open(checkpoint)
    assert before.router is None
    tasks = list(before.tasks)[:2]
    record = attach_router(checkpoint, tasks, network(3), others=True, temperature=1.5)
    after = Checkpoint.open(checkpoint)
    assert after.router == record
    assert (record.tasks, record.others, record.temperature, record.outputs) == (
        tasks,
        True,
        1.5,
        3,
    )
    for name, tensor in read_router_weights(checkpoint, record).items():
        assert torch.equal(tensor, network(3)[name])
    assert validate(checkpoint) == []
    # What is served differs, so the content has another digest; the weights have theirs.
    assert after.content_digest != before.content_digest
    assert [after.digest(task) for task in tasks] == [before.digest(task) for task in tasks]
    assert names(checkpoint) == {ROUTER_FILE, record.weights.file}


def test_another_router_takes_its_place_and_removing_it_leaves_nothing(routed: Path) -> None:
    plain = Checkpoint.open(routed)
    assert plain.router is not None
    record = attach_router(routed, plain.router.tasks, network(plain.router.outputs, seed=1))
    assert names(routed) == {ROUTER_FILE, record.weights.file}
    assert Checkpoint.open(routed).content_digest != plain.content_digest
    remove_router(routed)
    assert names(routed) == set()
    assert Checkpoint.open(routed).router is None
    with pytest.raises(OptionError, match="has no router"):
        remove_router(routed)


def test_a_users_file_of_a_like_name_stays(routed: Path) -> None:
    mine = routed / "router-mine.safetensors"
    mine.write_bytes(b"precious")
    attach_router(routed, list(Checkpoint.open(routed).tasks)[:2], network(2))
    assert mine.read_bytes() == b"precious"
    remove_router(routed)
    assert names(routed) == {mine.name}


def test_edits_keep_it_and_say_what_does_not_fit(routed: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(routed)
    gone, *kept = opened.tasks
    remove_tasks(routed, [gone], output=tmp_path / "elsewhere")
    remove_tasks(routed, [gone])
    pulled = pull_checkpoint(str(tmp_path / "elsewhere"), tmp_path / "pulled").path
    for folder in (routed, tmp_path / "elsewhere", pulled):
        after = Checkpoint.open(folder)
        assert after.router == opened.router
        assert after.router is not None
        read_router_weights(folder, after.router)
        fit = router_fit(after.router.tasks, after.tasks, after.aliases)
        assert (fit.unknown, fit.gone) == ([], [gone])
        assert validate(folder) == []
    attach_router(routed, [gone, kept[0]], network(2))
    after = Checkpoint.open(routed)
    assert after.router is not None
    fit = router_fit(after.router.tasks, after.tasks, after.aliases)
    assert (fit.unknown, fit.gone) == (kept[1:], [gone])


def test_compressing_over_it_keeps_it(routed: Path) -> None:
    from vllm_vlora.adapters.peft_folder import open_adapter
    from vllm_vlora.compression.options import CompressOptions
    from vllm_vlora.compression.pipeline import compress

    before = Checkpoint.open(routed)
    originals = routed.parent.parent / "adapters"
    adapters = {task: open_adapter(originals / task) for task in before.tasks}
    compress(adapters, routed, CompressOptions(ratio=1.0), force=True)
    after = Checkpoint.open(routed)
    assert after.router == before.router
    assert after.router is not None
    read_router_weights(routed, after.router)
    assert validate(routed) == []


def test_it_is_pushed_and_is_the_checkpoints_own(routed: Path, tmp_path: Path) -> None:
    opened = Checkpoint.open(routed)
    assert opened.router is not None
    wanted = {ROUTER_FILE, opened.router.weights.file}
    assert wanted <= _files(opened).keys()
    assert wanted <= (checkpoint_files(routed) or set())
    # A copy with all files that count is the same content, without the network it is none.
    copy = shutil.copytree(routed, tmp_path / "copy")
    Checkpoint.open(pinned(copy, opened.content_digest))
    (copy / opened.router.weights.file).unlink()
    assert len(validate(copy)) == 1
    # A folder of files of ours alone may be replaced.
    with publish_folder(routed, force=True, owned=checkpoint_files) as folder:
        (folder / "empty").touch()


# --- damage ---------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / ROUTER_FILE
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version=2), "version 2 is unknown"),
        (lambda c: c.update(features="text-2"), "features 'text-2' are unknown"),
        (lambda c: c.update(more=1), "unknown field"),
        (lambda c: c.update(temperature=0), "temperature"),
        (lambda c: c.update(temperature=1e300), "temperature"),
        (lambda c: c.update(tasks=c["tasks"][:1]), "2 to 10000 different tasks"),
        (lambda c: c.update(tasks=[c["tasks"][0]] * 2), "2 to 10000 different tasks"),
        (lambda c: c.update(tasks=["a\nb", "c"]), "control"),
        (lambda c: c["weights"].update(file="../../etc/passwd"), "foreign file"),
        (lambda c: c["weights"].update(file="tasks.json"), "foreign file"),
        (lambda c: c["weights"].update(sha256="x" * 64), "no SHA-256"),
        (lambda c: c["weights"].update(nbytes=-1), "nbytes"),
    ],
)
def test_a_record_that_is_none_is_refused(
    routed: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    rewritten(routed, change)
    with pytest.raises(CheckpointError, match=message):
        read_router(routed)
    assert any(ROUTER_FILE in problem for problem in validate(routed))
    # It can be taken away, and another one takes its place.
    tasks = list(Checkpoint.open(routed).tasks)
    attach_router(routed, tasks, network(len(tasks)))
    assert validate(routed) == []


def broken(name: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        made = make(tensors.pop(name))
        if made is not None:
            tensors[name] = made.contiguous()

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (broken("net.0.bias", lambda t: t * float("nan")), "net.0.bias holds NaN"),
        (broken("idf", lambda t: t + float("inf")), "idf holds NaN or numbers beyond"),
        (broken("net.2.weight", lambda t: t * 1e30), "numbers beyond 1e\\+06"),
        (broken("net.2.bias", lambda t: t[1:]), "net.2.bias is"),
        (broken("net.0.weight", lambda t: t.double()), "float64"),
        (broken("net.0.weight", lambda t: t[0]), "net.0.weight is missing or no matrix"),
        (broken("net.0.weight", lambda t: t.new_zeros(2000, 64)), "beyond"),
        (broken("idf", lambda _: None), "other tensors"),
        (lambda tensors: tensors.update(more=torch.zeros(1)), "other tensors"),
    ],
)
def test_a_network_that_is_none_is_refused(
    routed: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    """With a digest that fits: whoever writes the file writes that, too."""
    record = read_router(routed)
    assert record is not None
    tensors = load_file(routed / record.weights.file)
    change(tensors)
    save_file(tensors, routed / "new")
    digest, nbytes = hash_file(routed / "new")
    (routed / "new").rename(routed / weights_file(digest))
    rewritten(
        routed,
        lambda c: c.update(
            weights={"file": weights_file(digest), "sha256": digest, "nbytes": nbytes}
        ),
    )
    record = read_router(routed)
    assert record is not None
    with pytest.raises(CheckpointError, match=message):
        read_router_weights(routed, record)
    assert len(validate(routed)) == 1


def test_damaged_bytes_links_and_pipes_are_refused(routed: Path, tmp_path: Path) -> None:
    record = read_router(routed)
    assert record is not None
    file = routed / record.weights.file
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=file.name):
        read_router_weights(routed, record)
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        read_router_weights(routed, record)
    file.unlink()
    (tmp_path / "outside").write_bytes(data)
    file.symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="is a link out of its folder"):
        read_router_weights(routed, record)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_router_weights(routed, record)
    (routed / ROUTER_FILE).unlink()
    os.mkfifo(routed / ROUTER_FILE)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_router(routed)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda w: w.update({"net.0.weight": torch.zeros(2000, 64)}), {}, "beyond"),
        (broken("net.2.bias", lambda t: t * float("nan")), {}, "NaN"),
        (broken("net.2.bias", lambda t: t[1:]), {}, "net.2.bias is"),
        (lambda _: None, {"temperature": float("nan")}, "temperature"),
        (lambda _: None, {"temperature": 0.0}, "temperature"),
        (lambda _: None, {"others": True}, "net.2.weight is"),
        (lambda _: None, {"tasks": ["one", "one"]}, "different tasks"),
    ],
)
def test_what_no_reader_takes_is_not_attached(
    routed: Path, change: Callable[[Any], object], options: dict[str, Any], message: str
) -> None:
    before = {name: (routed / name).read_bytes() for name in names(routed)}
    weights = network(2)
    change(weights)
    with pytest.raises(OptionError, match=message):
        attach_router(routed, options.pop("tasks", ["one", "other"]), weights, **options)
    assert {name: (routed / name).read_bytes() for name in names(routed)} == before

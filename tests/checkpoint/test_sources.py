"""Checkpoints and adapters at URLs: fetched once, checked, resumed, shared, and silent about keys."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from edited_world import NEW, OLD, World
from file_server import FileServer, file_server
from fsspec.implementations.memory import MemoryFileSystem
from places import ROOT
from rich.console import Console
from routers import network
from typer.testing import CliRunner

from vllm_vlora import downloads, urls
from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint.attachments import AttachmentWriter
from vllm_vlora.checkpoint.hub import pull_checkpoint
from vllm_vlora.checkpoint.pinning import pinned
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.sources import checkpoint_folder, fixed_checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.downloads import Parts
from vllm_vlora.editing.aliasing import set_alias
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.editing.routing import attach_router
from vllm_vlora.errors import AdapterError, CheckpointError, LockedError, OutputError, VLoRAError
from vllm_vlora.locking import waiting_at_most
from vllm_vlora.plugin import _checkpoint_folder
from vllm_vlora.tools.cli import app
from vllm_vlora.tools.terminal import reported

KEY = "sig=S3cr3t%2FKey"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World.at(tmp_path_factory.mktemp("made"))
    template = world.root / "chat_template.jinja"
    template.write_text("hello")
    writer = AttachmentWriter(world.checkpoint)
    writer.attach(OLD[0], {template.name: template})
    writer.finish()
    set_alias(world.checkpoint, "prod", OLD[0])
    attach_router(world.checkpoint, OLD, network(len(OLD)))
    return world


@pytest.fixture
def world(made: World, tmp_path: Path) -> World:
    shutil.copytree(made.root, tmp_path / "world")
    return World(tmp_path / "world")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(downloads.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(downloads.OFFLINE_VARIABLE, raising=False)
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def server(world: World) -> Iterator[FileServer]:
    with file_server(world.place) as served:
        yield served


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def parts(cache: Path) -> list[Path]:
    return list(cache.rglob("*.part"))


def to_memory(folder: Path, place: str) -> str:
    files = fsspec.filesystem("memory")
    if files.exists(place):
        files.rm(place, recursive=True)
    for name, data in content(folder).items():
        files.pipe(f"{place}/{name}", data)
    return f"memory://{place}"


def begun(cache: Path, file: Path) -> list[Path]:
    """What there is of one file; when a run ends others may be begun too."""
    key = hashlib.sha256(file.read_bytes()).hexdigest()
    return list(cache.rglob(f"{key}.part"))


def sizes(paths: list[Path]) -> list[int]:
    return [path.stat().st_size for path in paths]


def largest(folder: Path) -> tuple[str, int]:
    path = max((p for p in folder.rglob("*.safetensors")), key=lambda p: p.stat().st_size)
    return path.relative_to(folder.parent).as_posix(), path.stat().st_size


def test_a_checkpoint_at_a_url_is_the_folder_byte_for_byte(
    server: FileServer, world: World
) -> None:
    opened = Checkpoint.open(f"{server.url}/ckpt/")
    assert content(opened.path) == content(world.checkpoint)
    assert opened.content_digest == Checkpoint.open(world.checkpoint).content_digest
    assert opened.path.name == opened.content_digest
    assert opened.attachments[OLD[0]]
    assert opened.router is not None
    assert opened.router.tasks == list(OLD)
    assert opened.aliases["prod"][0].blend[0].task == OLD[0]
    assert validate(f"{server.url}/ckpt") == []
    asked = dict(server.asked)
    Checkpoint.open(f"{server.url}/ckpt")
    again = {name: server.asked[name] - count for name, count in asked.items()}
    assert {name for name, count in again.items() if count} == {
        "ckpt/vlora_config.json",
        "ckpt/attachments.json",
        "ckpt/aliases.json",
        "ckpt/router.json",
    }


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_every_format_is_fetched_whole(version: int) -> None:
    folder = ROOT / f"tests/data/format{version}"
    with file_server(folder) as server:
        first = Checkpoint.open(server.url, manifest_only=True)
        assert [first.record(task).source for task in first.tasks]
        assert content(Checkpoint.open(server.url).path) == content(folder)
        assert validate(server.url) == []


class Store(MemoryFileSystem):
    """Object stores answer 416 where a range begins behind the end of what they have."""

    protocol = "store"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("store://"))

    def cat_file(self, path: str, start: int = 0, end: int | None = None, **more: Any) -> bytes:
        data = super().cat_file(path, **more)
        if start >= len(data):
            raise OSError(errno.EINVAL, "The requested range is not satisfiable")
        return data[start:end]


fsspec.register_implementation("store", Store, clobber=True)


@pytest.mark.parametrize("scheme", ["memory", "store"])
@pytest.mark.parametrize("chunk", [urls._CHUNK, 10])
def test_object_stores_are_read_through_fsspec(
    world: World, monkeypatch: pytest.MonkeyPatch, scheme: str, chunk: int
) -> None:
    """Also what is empty, and what has as many bytes as are asked for at once."""
    (world.checkpoint / "LICENSE.md").write_bytes(b"")
    (world.checkpoint / "LICENSE.txt").write_bytes(b"ten bytes.")
    monkeypatch.setattr(urls, "_CHUNK", chunk)
    to_memory(world.checkpoint, "/bucket/ckpt")
    opened = Checkpoint.open(f"{scheme}://bucket/ckpt")
    assert content(opened.path) == content(world.checkpoint)
    with pytest.raises(
        CheckpointError, match=rf"{scheme}://bucket/none is not a vllm-vlora checkpoint"
    ):
        Checkpoint.open(f"{scheme}://bucket/none")


def test_a_file_that_is_shorter_by_now_is_another_one() -> None:
    files = fsspec.filesystem("store")
    files.pipe("/bucket/one/f", b"abc")
    remote = urls.RemoteFolder("store://bucket/one")
    assert list(remote.stream(urls.RemoteFile("f", 9), 5)) == []
    assert list(remote.stream(urls.RemoteFile("f", 9), 1)) == [b"bc"]
    with pytest.raises(urls.RemoteError, match="more than the 2 bytes"):
        remote.read("f", 2)
    assert remote.read("f", 3) == b"abc"


@pytest.mark.parametrize("size", [3, None])
def test_what_goes_wrong_within_a_file_is_no_end_of_it(
    monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise OSError(errno.EIO, "the store is ill")

    fsspec.filesystem("store").pipe("/bucket/one/f", b"abc")
    monkeypatch.setattr(Store, "cat_file", fail)
    monkeypatch.setattr(Store, "size", lambda *_: size)
    remote = urls.RemoteFolder("store://bucket/one")
    with pytest.raises(urls.RemoteError):
        list(remote.stream(urls.RemoteFile("f", 3), 1))


def test_a_file_url_is_the_folder_where_it_lies(world: World, cache: Path) -> None:
    named = world.place / "my tasks"
    world.checkpoint.rename(named)
    opened = Checkpoint.open(f"file://{world.place}/my%20tasks")
    assert opened.path == named
    assert not cache.exists()
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(f"file://{world.place}/none")


def test_the_manifest_alone_is_fetched_where_it_is_enough(server: FileServer) -> None:
    opened = Checkpoint.open(f"{server.url}/ckpt", manifest_only=True)
    assert list(opened.tasks) == list(OLD)
    assert not any(name.endswith(".safetensors") for name in server.asked)
    assert content(Checkpoint.open(f"{server.url}/ckpt").path) == content(server.folder / "ckpt")


def test_a_new_state_shares_what_did_not_change(server: FileServer, world: World) -> None:
    old = Checkpoint.open(f"{server.url}/ckpt")
    kept = world.place / "kept"
    shutil.copytree(world.checkpoint, kept)
    remove_tasks(world.checkpoint, [OLD[3]])
    server.asked.clear()
    new = Checkpoint.open(f"{server.url}/ckpt")
    assert list(new.tasks) == list(OLD[:3])
    assert not any("/tasks/" in name for name in server.asked)
    file = old.tasks[OLD[0]].file
    assert os.path.samefile(old.path / file, new.path / file)
    # The state that was fetched first is as it was, for who serves it.
    assert content(old.path) == content(kept)


def test_an_alias_alone_makes_a_new_state(server: FileServer, world: World) -> None:
    url = f"{server.url}/ckpt"
    old = Checkpoint.open(url)
    done = CliRunner().invoke(app, ["alias", str(world.checkpoint), "other", OLD[1]])
    assert done.exit_code == 0, done.output
    new = Checkpoint.open(url)
    assert set(new.aliases) - set(old.aliases) == {"other"}
    assert Checkpoint.open(pinned(url, old.content_digest)).path == old.path
    assert content(new.path) == content(world.checkpoint)


def test_a_cut_connection_goes_on_where_it_was_cut(server: FileServer, cache: Path) -> None:
    name, size = largest(server.folder / "ckpt")
    server.cut[name] = [size // 3, size // 4]
    opened = Checkpoint.open(f"{server.url}/ckpt")
    assert validate(opened.path) == []
    assert server.first_bytes(name) == [0, size // 3, size // 3 + size // 4]
    assert parts(cache) == []


def test_a_run_that_was_cut_off_is_taken_up_by_the_next(server: FileServer, cache: Path) -> None:
    name, size = largest(server.folder / "ckpt")
    server.cut[name] = [size // 2, 0, 0, 0, 0, 0]
    with pytest.raises(CheckpointError, match=r"cannot be reached|bytes, not"):
        Checkpoint.open(f"{server.url}/ckpt")
    assert sizes(begun(cache, server.folder / name)) == [size // 2]
    assert not list(cache.glob("*/states/*"))
    server.cut.clear()
    server.begun.clear()
    assert validate(Checkpoint.open(f"{server.url}/ckpt").path) == []
    assert server.first_bytes(name) == [size // 2]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_ends_at_once_and_loses_nothing(
    server: FileServer, cache: Path, number: int
) -> None:
    name, size = largest(server.folder / "ckpt")
    server.held[name] = size // 2
    url = f"{server.url}/ckpt"
    command = [sys.executable, "-P", "-m", "vllm_vlora.tools", "validate", url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 60
        while sizes(begun(cache, server.folder / name)) != [size // 2]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stopped = time.monotonic()
        run.send_signal(number)
        said = run.communicate(timeout=30)[1]
    assert time.monotonic() - stopped < 10
    assert run.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in said
    assert "download 0.0 MB ..." in said
    server.held.clear()
    server.begun.clear()
    assert validate(Checkpoint.open(url).path) == []
    assert server.first_bytes(name) == [size // 2]


@pytest.mark.timeout(60)
def test_a_run_that_is_stopped_while_it_begins_ends_at_once(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, size = largest(server.folder / "ckpt")
    server.held[name] = size // 2

    class Stopped(ThreadPoolExecutor):
        begun = False

        def submit(self, *asked: Any, **more: Any) -> Any:
            future = super().submit(*asked, **more)
            if not self.begun and asked[-1].sha256 == held:
                self.begun = True
                while sizes(begun(cache, server.folder / name)) != [size // 2]:
                    time.sleep(0.01)
                raise KeyboardInterrupt
            return future

    held = hashlib.sha256((server.folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(downloads, "ThreadPoolExecutor", Stopped)
    with pytest.raises(KeyboardInterrupt):
        Checkpoint.open(f"{server.url}/ckpt")


def test_what_was_left_and_is_no_part_of_the_file_is_fetched_anew(
    server: FileServer, cache: Path
) -> None:
    name, size = largest(server.folder / "ckpt")
    server.cut[name] = [size // 2] + [0] * 5
    with pytest.raises(CheckpointError):
        Checkpoint.open(f"{server.url}/ckpt")
    server.cut.clear()
    (part,) = begun(cache, server.folder / name)
    part.write_bytes(b"x" * 100)
    server.begun.clear()
    assert validate(Checkpoint.open(f"{server.url}/ckpt").path) == []
    assert server.first_bytes(name) == [100, 0]


def test_a_server_without_ranges_sends_all_of_it_again(server: FileServer, cache: Path) -> None:
    server.ranges = False
    name, size = largest(server.folder / "ckpt")
    server.cut[name] = [size // 2]
    assert validate(Checkpoint.open(f"{server.url}/ckpt").path) == []
    assert parts(cache) == []


def test_damage_on_the_way_is_not_kept(server: FileServer, cache: Path) -> None:
    name, _ = largest(server.folder / "ckpt")
    data = bytearray((server.folder / name).read_bytes())
    key = hashlib.sha256(data).hexdigest()
    data[-1] ^= 1
    (server.folder / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"has another SHA-256 than it is to have"):
        Checkpoint.open(f"{server.url}/ckpt")
    assert not list(cache.rglob(f"{key}*"))
    assert not list(cache.glob("*/states/*"))


def test_a_folder_that_is_replaced_while_it_is_fetched(
    server: FileServer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = downloads._fetch_all
    changes = [lambda: remove_tasks(world.checkpoint, [OLD[3]])]

    def replaced(*asked: Any, **more: Any) -> Any:
        if changes:
            changes.pop()()
        return fetch(*asked, **more)

    monkeypatch.setattr(downloads, "_fetch_all", replaced)
    assert list(Checkpoint.open(f"{server.url}/ckpt").tasks) == list(OLD[:3])


def test_without_an_answer_the_newest_state_is_used_and_said(
    server: FileServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/ckpt?{KEY}"
    first = Checkpoint.open(url)
    server.status = 503
    with caplog.at_level(logging.WARNING):
        assert Checkpoint.open(url).path == first.path
    assert "the state that was fetched last is used" in caplog.text
    caplog.clear()
    # An answer is an answer: what was withdrawn is not served from memory.
    for status, said in ((403, "is denied .403."), (404, "is not a vllm-vlora checkpoint")):
        server.status = status
        with pytest.raises(CheckpointError, match=said):
            Checkpoint.open(url)
    monkeypatch.setenv(downloads.OFFLINE_VARIABLE, "1")
    server.asked.clear()
    assert Checkpoint.open(url).path == first.path
    assert not server.asked
    assert not caplog.records
    with pytest.raises(CheckpointError, match="not in the cache, and VLLM_VLORA_OFFLINE is set"):
        Checkpoint.open(f"{server.url}/other")


def test_a_digest_is_never_met_by_older_content(
    server: FileServer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/ckpt"
    old = Checkpoint.open(url).content_digest
    remove_tasks(world.checkpoint, [OLD[3]])
    new = Checkpoint.open(world.checkpoint).content_digest
    server.status = 503
    with pytest.raises(CheckpointError, match="503"):
        Checkpoint.open(pinned(url, new))
    monkeypatch.setenv(downloads.OFFLINE_VARIABLE, "1")
    with pytest.raises(CheckpointError, match="the content that is asked for is not in the cache"):
        Checkpoint.open(pinned(url, new))
    # The content that was asked for is here, whatever the URL has now.
    assert list(Checkpoint.open(pinned(url, old)).tasks) == list(OLD)
    monkeypatch.delenv(downloads.OFFLINE_VARIABLE)
    server.status = None
    server.asked.clear()
    assert list(Checkpoint.open(pinned(url, old)).tasks) == list(OLD)
    assert not server.asked
    with pytest.raises(
        CheckpointError, match=f"its content is sha256:{new}, not sha256:{'0' * 64}"
    ):
        Checkpoint.open(pinned(url, "0" * 64))


def test_processes_that_a_server_starts_find_its_state(server: FileServer, world: World) -> None:
    url = f"{server.url}/ckpt"
    folder = checkpoint_folder(url)
    fixed = fixed_checkpoint(url, folder, None)
    remove_tasks(world.checkpoint, [OLD[3]])
    server.status = 503
    assert Checkpoint.open(fixed).path == folder
    assert fixed_checkpoint(str(world.checkpoint), world.checkpoint, None) == str(world.checkpoint)


def test_the_plugin_serves_one_state_in_all_its_processes(
    server: FileServer, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/ckpt"
    digest = Checkpoint.open(world.checkpoint).content_digest
    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", url)
    first = _checkpoint_folder()
    assert os.environ["VLLM_VLORA_CHECKPOINT"] == pinned(url, digest)
    remove_tasks(world.checkpoint, [OLD[3]])
    server.status = 503
    assert first == _checkpoint_folder() == pinned(Checkpoint.open(url).path, digest)


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "leaves the checkpoint": lambda config: config["basis"][0].update(file="../../outside"),
    "has no SHA-256": lambda config: config["basis"][0].update(sha256="../../outside"),
    "have one name": lambda config: config["basis"][0].update(file="vlora_config.json"),
}


@pytest.mark.parametrize("said", HOSTILE)
def test_no_name_leads_out_of_the_cache(
    server: FileServer, world: World, cache: Path, said: str
) -> None:
    file = world.checkpoint / "vlora_config.json"
    config = json.loads(file.read_text())
    HOSTILE[said](config)
    file.write_text(json.dumps(config))
    (server.folder / "outside").write_text("x")
    with pytest.raises(CheckpointError, match=said):
        Checkpoint.open(f"{server.url}/ckpt")
    assert not [path for path in cache.parent.rglob("outside*") if path.parent != server.folder]
    assert not list(cache.glob("*/states/*"))


def test_listed_names_stay_inside(cache: Path) -> None:
    files = fsspec.filesystem("memory")
    files.store["/evil/ad/../../../escaped"] = files.open("/evil/x", "wb")
    files.pipe("/evil/ad/adapter_config.json", b"{}")
    with pytest.raises(AdapterError):
        open_adapter("memory://evil/ad")
    assert not list(cache.parent.rglob("escaped"))


def every_text_of(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)) + str(error)


@pytest.mark.parametrize("status", [401, 403, 404, 410, 500, 503, None])
def test_keys_in_a_url_reach_no_message_log_or_file(
    server: FileServer, cache: Path, status: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    server.status = status
    address = server.url.removeprefix("http://")
    url = f"http://me:pa55word@{address}/ckpt?{KEY}"
    caplog.set_level(logging.WARNING)
    said = ""
    for ref, opener in ((url, Checkpoint.open), (url, open_adapter)):
        try:
            opener(ref)
        except VLoRAError as error:
            said += every_text_of(error)
    runner = CliRunner()
    for arguments in (
        ["info", url, "--json"],
        ["info", url],
        ["validate", url, "--verbose"],
        ["pull", url, "-o", str(cache.parent / "copy")],
        ["plan", url, "--max-loras", "4"],
        ["serve", "--dry-run", url],
        ["serve", "--base", "org/base", "--dry-run", url],
        ["compress", url, "-o", str(cache.parent / "out")],
        ["add", url, str(cache)],
    ):
        done = runner.invoke(app, arguments)
        assert done.exception is None or isinstance(done.exception, SystemExit), arguments
        said += done.output
    said += caplog.text + " ".join(map(str, cache.rglob("*")))
    said += " ".join(path.read_text(errors="replace") for path in cache.rglob("url"))
    assert address in said
    for secret in (KEY, "S3cr3t", "pa55word"):
        assert secret not in said


def test_a_signature_opens_every_file_and_names_none(server: FileServer, cache: Path) -> None:
    server.key = KEY
    first = Checkpoint.open(f"{server.url}/ckpt?{KEY}&expires=1")
    second = Checkpoint.open(f"{server.url}/ckpt?{KEY}&expires=2")
    assert first.path == second.path
    with pytest.raises(CheckpointError, match=r"access to vlora_config.json is denied \(403\)"):
        Checkpoint.open(f"{server.url}/ckpt")


@pytest.mark.parametrize("url", ["s3://bucket/ckpt", "gs://bucket/ckpt", "abfs://box/ckpt"])
def test_a_missing_backend_is_named(url: str) -> None:
    package = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}[url.partition(":")[0]]
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(CheckpointError, match=rf"(?i)install {package}") as caught:
            Checkpoint.open(url)
        assert "\n" not in str(caught.value)
    else:
        pytest.skip(f"{package} is installed")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nothing://", "nothing reads nothing://"),
        ("nothing://a/b", "nothing reads nothing://"),
        ("memory://", "the URL names nothing behind memory://"),
        ("https://", "the URL names nothing behind https://"),
        ("http:///ckpt", "the URL names nothing behind http://"),
        ("https://?sig=secret", "the URL names nothing behind https://"),
        ("s3://key:secret@bucket/ckpt", "s3:// takes no keys in the URL"),
        ("GS://secret@bucket/ckpt", "gs:// takes no keys in the URL"),
    ],
)
def test_a_url_that_names_no_store_is_refused_as_such(url: str, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as raised:
        Checkpoint.open(url)
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_two_containers_of_an_account_are_two_places() -> None:
    one, other = (f"abfs://{box}@account.dfs.core.windows.net/tasks" for box in ("one", "other"))
    assert downloads.cache_name(one) != downloads.cache_name(other)


@pytest.mark.parametrize("url", ["s3://key:s3cret@bucket/out", "file:///out"])
def test_nothing_is_written_to_a_url(
    world: World, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.chdir(world.root)
    before = sorted(world.root.rglob("*"))
    for arguments in (
        ["compress", str(world.adapter(NEW[0]))],
        ["pull", str(world.checkpoint)],
        ["export", str(world.checkpoint), OLD[0]],
        ["add", str(world.checkpoint), str(world.adapter(NEW[0]))],
    ):
        done = CliRunner().invoke(app, [*arguments, "-o", url])
        assert done.exit_code == 2, arguments
        shown = url.replace("key:s3cret@", "")
        assert f"{shown} is a URL; name a folder of this machine" in done.output
    assert sorted(world.root.rglob("*")) == before


def test_a_file_url_without_a_path_is_not_the_working_folder(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world.checkpoint)
    with pytest.raises(CheckpointError, match="is not a vllm-vlora checkpoint"):
        Checkpoint.open("file://")


@pytest.mark.parametrize("url", ["nothing://a/b", "zip://x::https://host/y", "http://[/"])
def test_what_is_no_folder_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(url)
    assert "\n" not in str(caught.value)


# --- adapters -------------------------------------------------------------------------------------


def test_an_adapter_at_a_url(world: World) -> None:
    local = open_adapter(world.adapter(NEW[0]))
    with file_server(world.root) as server:
        for ref in (
            f"{server.url}/adapters/{NEW[0]}?{KEY}",
            to_memory(world.adapter(NEW[0]), f"/b/{NEW[0]}"),
        ):
            found = open_adapter(ref)
            assert found.name == NEW[0]
            assert found.config == local.config
            for name, (a, b) in local.iter_factors():
                assert found.factors(name)[0].equal(a)
                assert found.factors(name)[1].equal(b)
        with pytest.raises(AdapterError, match=r"adapter_config.json is not there"):
            open_adapter(f"{server.url}/adapters/none")


def test_an_adapter_that_is_trained_again_is_fetched_again(world: World) -> None:
    url = to_memory(world.adapter(NEW[0]), "/b/one")
    first = open_adapter(url)
    assert open_adapter(url).path == first.path
    to_memory(world.adapter(NEW[1]), "/b/one")
    assert content(open_adapter(url).path) == content(world.adapter(NEW[1]))


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def adapters(world: World) -> Iterator[FileServer]:
    """A server of one adapter, ``one``."""
    shutil.copytree(world.adapter(NEW[0]), world.root / "one")
    (world.root / "one" / "chat_template.jinja").write_text("hello")
    with file_server(world.root) as served:
        yield served


def versions(world: World) -> tuple[bytes, bytes]:
    """The weights of two adapters of the same size."""
    data = (world.adapter(NEW[0]) / WEIGHTS).read_bytes()
    return data, data[:-8] + bytes(8)


def publish(world: World, data: bytes) -> None:
    (world.root / "one" / WEIGHTS).write_bytes(data)


def fetched(server: FileServer) -> bytes:
    """The weights of what is opened."""
    return (open_adapter(f"{server.url}/one").path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("etags", [True, False])
def test_an_adapter_that_is_published_again_in_its_place_is_seen(
    adapters: FileServer, world: World, etags: bool
) -> None:
    """Also of the same size, where the server says neither an ETag nor a date."""
    adapters.etags = etags
    old, new = versions(world)
    for data in (old, new, old):
        publish(world, data)
        assert fetched(adapters) == data


@pytest.mark.parametrize("etags", [True, False])
def test_nothing_is_gone_on_with_that_nothing_names(
    adapters: FileServer, world: World, etags: bool
) -> None:
    adapters.etags = etags
    old, new = versions(world)
    adapters.cut[f"one/{WEIGHTS}"] = [len(old) // 2, *[0] * 5]
    with pytest.raises(AdapterError):
        fetched(adapters)
    adapters.cut.clear()
    publish(world, new)
    assert fetched(adapters) == new
    publish(world, old)
    adapters.begun.clear()
    assert fetched(adapters) == old
    assert adapters.first_bytes(f"one/{WEIGHTS}") == [len(old) // 2 if etags else 0]


def test_within_a_run_what_nothing_names_begins_anew_and_ends(
    adapters: FileServer, world: World, cache: Path
) -> None:
    adapters.etags = False
    data, _ = versions(world)
    cuts = adapters.cut[f"one/{WEIGHTS}"] = [len(data) // 2]
    assert fetched(adapters) == data
    assert adapters.first_bytes(f"one/{WEIGHTS}") == [0, 0]
    assert parts(cache) == []
    # One that is always cut is not asked for without end.
    shutil.rmtree(cache)
    cuts.extend([len(data) // 2] * 20)
    with pytest.raises(AdapterError):
        fetched(adapters)
    assert len(cuts) > 10


def test_two_files_of_one_content_that_nothing_names(adapters: FileServer) -> None:
    adapters.etags = False
    names = ("adapter_config.json", WEIGHTS, *(f"t{number}.jinja" for number in range(6)))
    for name in names[2:]:
        (adapters.folder / "one" / name).write_text("hello")
    for _ in range(3):
        found = downloads.fetch_folder(f"{adapters.url}/one", names, names[0])
        assert {p.name: p.read_text() for p in found.glob("t*")} == dict.fromkeys(
            names[2:], "hello"
        )
    # It is kept once, however often it came.
    assert parts(found.parents[1]) == []
    contents = {p.stat().st_ino for p in (found.parents[1] / "files").iterdir()}
    assert contents == {p.stat().st_ino for p in found.iterdir()}


def test_files_of_one_content_that_a_store_names_keep_their_names(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in Git LFS: a run's end and its last checkpoint, and one tokenizer of all."""
    runs = {"sql": NEW[0], "sql/checkpoint-9": NEW[0], "fr": NEW[1]}
    files = {
        f"{run}/{name}": data
        for run, new in runs.items()
        for name, data in {**content(world.adapter(new)), "tokenizer.json": b"{}"}.items()
    }
    for name, data in files.items():
        Store().pipe(f"/lfs/{name}", data)
    listed = {
        f"/lfs/{name}": {"size": len(data), "lfs": {"sha256": hashlib.sha256(data).hexdigest()}}
        for name, data in files.items()
    }
    monkeypatch.setattr(Store, "find", lambda *_, **__: listed)
    found = downloads.fetch_folder("store://lfs", ["*"], "adapter_config.json")
    assert content(found) == files
    # The name of the state says so too, and nothing is fetched again.
    assert downloads.fetch_folder("store://lfs", ["*"], "adapter_config.json") == found


@pytest.mark.parametrize("shorter", [False, True])
def test_what_came_of_a_later_version_is_not_kept_as_the_former(
    adapters: FileServer, world: World, shorter: bool
) -> None:
    """Published between the listing and the request, and taken back since."""
    old, new = versions(world)
    new = bytes(len(old) // 2) if shorter else new
    adapters.before[f"one/{WEIGHTS}"] = lambda: publish(world, new)
    if shorter:
        with pytest.raises(AdapterError):
            fetched(adapters)
    else:
        assert fetched(adapters) == new
    publish(world, old)
    assert fetched(adapters) == old


INFOS = {
    "hf": {"blob_id": "b", "xet_hash": None, "last_commit": None},
    "hf-bucket": {"xet_hash": "x", "uploaded_at": "2026"},
    "github": {"sha": "s", "mode": "100644"},
    "git": {"hex": "h"},
    "ftp": {"modify": "20260101000000", "perm": "r"},
    "webhdfs": {"modificationTime": 17},
    "smb": {"mtime": 17.5, "time": 18.5},
    "drive": {"md5Checksum": "m"},
    "abfs": {"etag": "0x8D", "creation_time": "2026"},
    "gs": {"md5Hash": "m", "generation": "1"},
    "s3": {"ETag": '"e"', "VersionId": None, "StorageClass": "STANDARD"},
    "http": {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "mimetype": "text/plain"},
}


@pytest.mark.parametrize("store", INFOS)
def test_what_every_store_tells_contents_from_each_other_by(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listed(info: dict[str, Any]) -> urls.RemoteFile:
        found = {"/bucket/one/f": {"name": "/bucket/one/f", "type": "file", "size": 3, **info}}
        monkeypatch.setattr(Store, "find", lambda *_, **__: found)
        (file,) = urls.RemoteFolder("store://bucket/one").files(["*"])
        return file

    info = INFOS[store]
    assert listed(info).is_known
    assert listed(info) == listed(dict(info))
    assert listed(info).key != listed({**info, next(iter(info)): "other"}).key
    assert not listed({"type": "file", "time": 1, "mode": 3, "ETag": ""}).is_known
    digest = hashlib.sha256(b"abc").hexdigest()
    assert listed({"lfs": {"sha256": digest, "size": 3}}).key == digest
    assert not listed({"lfs": {"sha256": "../x"}}).is_known


@pytest.mark.parametrize("status", [401, 429, 500, 503])
def test_a_server_that_is_busy_has_not_said_that_a_file_is_not_there(
    adapters: FileServer, world: World, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"{adapters.url}/one"
    for name in ("chat_template.jinja", WEIGHTS):
        adapters.statuses = {f"one/{name}": status}
        with pytest.raises(AdapterError, match=f"{status}"):
            open_adapter(url)
    adapters.statuses.clear()
    whole = open_adapter(url)
    assert "chat_template.jinja" in whole.companions
    # No state of less was published meanwhile, nor is now.
    adapters.statuses = {f"one/{WEIGHTS}": status}
    if status == 401:
        with pytest.raises(AdapterError, match="401"):
            open_adapter(url)
    else:
        assert open_adapter(url).path == whole.path
        assert "the state that was fetched last is used" in caplog.text
    adapters.status = 503
    assert open_adapter(url).path == whole.path


@pytest.mark.parametrize("status", [403, 404, 410])
def test_stores_say_in_three_ways_that_a_file_is_not_there(
    adapters: FileServer, status: int, cache: Path
) -> None:
    """S3 says 403 where the key may not list."""
    url = f"{adapters.url}/one"
    adapters.statuses = {"one/chat_template.jinja": status}
    assert "chat_template.jinja" not in open_adapter(url).companions
    shutil.rmtree(cache)
    adapters.statuses[f"one/{WEIGHTS}"] = status
    with pytest.raises(AdapterError, match=r"no weights .* check the URL"):
        open_adapter(url)
    assert not list(cache.glob("*/states/*"))


@pytest.mark.parametrize("name", ["chat_template.jinja", WEIGHTS])
def test_a_file_without_a_length_is_not_left_out(adapters: FileServer, name: str) -> None:
    adapters.unmeasured.add(f"one/{name}")
    with pytest.raises(AdapterError, match=f"how many bytes {name} has .* copy the folder"):
        open_adapter(f"{adapters.url}/one")


@pytest.mark.parametrize("status", [401, 503])
def test_no_part_of_a_checkpoint_is_left_out_by_a_server_that_is_busy(
    server: FileServer, status: int
) -> None:
    server.statuses["ckpt/attachments.json"] = status
    with pytest.raises(CheckpointError, match=str(status)):
        Checkpoint.open(f"{server.url}/ckpt")


def test_commands_take_urls(world: World, cache: Path) -> None:
    runner = CliRunner()
    tree = to_memory(world.root / "adapters", "/team/adapters")
    out = world.root / "out"
    done = runner.invoke(app, ["compress", tree, "-o", str(out), "--ratio", "2"])
    assert done.exit_code == 0, done.output
    assert sorted(Checkpoint.open(out).tasks) == sorted(OLD + NEW)
    one = to_memory(world.adapter(NEW[0]), f"/team/{NEW[0]}")
    done = runner.invoke(app, ["add", str(world.checkpoint), one])
    assert done.exit_code == 0, done.output
    assert NEW[0] in Checkpoint.open(world.checkpoint).tasks
    ckpt = to_memory(world.checkpoint, "/team/ckpt")
    for arguments in (
        ["info", ckpt],
        ["validate", ckpt],
        ["plan", ckpt, "--max-loras", "4"],
        ["export", ckpt, OLD[0], "-o", str(world.root / "exported")],
        ["pull", ckpt, "-o", str(world.root / "pulled")],
    ):
        done = runner.invoke(app, arguments)
        assert done.exit_code == 0, (arguments, done.output)
    assert content(world.root / "pulled") == content(world.checkpoint)
    done = runner.invoke(app, ["remove", ckpt, OLD[0]])
    assert done.exit_code == 2
    assert "pull" in done.output


# --- the cache ------------------------------------------------------------------------------------


def test_a_terminal_has_a_bar_while_something_comes(
    server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("vllm_vlora.tools.terminal.open_console", lambda stderr: terminal)
    with reported(verbose=False):
        Checkpoint.open(f"{server.url}/ckpt")
    shown = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "download" in shown
    assert "kB" in shown
    # The cursor is shown again, and the line of the bar is gone.
    assert shown.rindex("\x1b[?25h") > shown.rindex("download")


def test_many_processes_fetch_once(server: FileServer, cache: Path) -> None:
    program = (
        "import sys; from vllm_vlora.checkpoint.reader import Checkpoint\n"
        "print(Checkpoint.open(sys.argv[1]).path)"
    )
    command = [sys.executable, "-c", program, f"{server.url}/ckpt"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {run.communicate(timeout=120)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(paths) == 1
    name, _ = largest(server.folder / "ckpt")
    assert server.first_bytes(name) == [0]
    assert not list(cache.glob(".*.lock"))


def test_a_full_disk_under_the_cache(
    server: FileServer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    url = f"{server.url}/ckpt"
    with monkeypatch.context() as patched:
        patched.setattr(downloads, "_flush", full)
        with pytest.raises(OutputError, match=r"the cache at \S+ cannot be written: No space left"):
            Checkpoint.open(url)
    assert not list(cache.glob("*/states/*"))
    assert all(path.suffix == ".part" for path in cache.glob("*/files/*"))
    assert validate(Checkpoint.open(url).path) == []


def test_a_disk_full_at_every_page(server: FileServer, tmp_path: Path) -> None:
    place = tmp_path / "cache"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("may not mount a disk here")
    try:
        failures = 0
        for left in range(512):
            shutil.rmtree(place, ignore_errors=True)
            free = os.statvfs(place)
            with open(place / "filler", "wb") as filler:
                os.posix_fallocate(filler.fileno(), 0, max(1, free.f_bavail - left) * free.f_frsize)
            try:
                opened = Checkpoint.open(f"{server.url}/ckpt")
            except OutputError as error:
                failures += "cannot be written: No space left" in str(error)
                for file in place.glob("*/files/*"):
                    whole = file.suffix != ".part"
                    assert not whole or hashlib.sha256(file.read_bytes()).hexdigest() == file.name
                assert not [s for s in place.glob("*/states/*") if not s.name.startswith(".")]
            else:
                assert validate(opened.path) == []
                break
        assert failures == left > 2
        assert validate(f"{server.url}/ckpt") == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


class SlowFolder(urls.RemoteFolder):
    """A file that comes in pieces, the second of which waits until it may."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.asked = 0

    def stream(self, file: urls.RemoteFile, start: int) -> Iterator[bytes]:
        self.asked += 1
        middle = len(self.data) // 2
        yield self.data[start:middle]
        self.begun.set()
        assert self.go_on.wait(30)
        yield self.data[max(start, middle) :]

    def close(self) -> None:
        pass


@pytest.fixture
def slow() -> Iterator[tuple[SlowFolder, urls.RemoteFile, Path]]:
    """A folder, its file, and a state that is to get it."""
    data = os.urandom(1000)
    file = urls.RemoteFile("tasks/a", len(data), hashlib.sha256(data).hexdigest())
    remote = SlowFolder(data)
    later = downloads.Cached("https://h/x").add("b" * 64, remote, [], {}, Parts.TASKS_LATER)
    yield remote, file, later
    remote.go_on.set()


def test_a_task_and_the_whole_are_fetched_side_by_side(
    slow: tuple[SlowFolder, urls.RemoteFile, Path], cache: Path
) -> None:
    """The file of both comes once, whoever is first, and nobody writes into what another one writes."""
    remote, file, later = slow
    cached = downloads.Cached("https://h/x")
    with ThreadPoolExecutor(2) as pool:
        task = pool.submit(cached.add_file, later, remote, file)
        assert remote.begun.wait(30)
        whole = pool.submit(cached.add, "a" * 64, remote, [file], {})
        time.sleep(0.3)
        remote.go_on.set()
        task.result(30)
        state = whole.result(30)
    assert (later / file.name).read_bytes() == remote.data
    assert (state / file.name).samefile(later / file.name)
    assert remote.asked == 1
    assert sorted(p.name for p in (cached.folder / "files").iterdir()) == [file.key]


def test_cleaning_leaves_what_is_being_fetched(
    slow: tuple[SlowFolder, urls.RemoteFile, Path], cache: Path
) -> None:
    remote, file, later = slow
    files = later.parents[1] / "files"
    (files / f"{'c' * 64}.part").write_bytes(b"left by one that was cut off")
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(downloads.Cached("https://h/x").add_file, later, remote, file)
        assert remote.begun.wait(30)
        (entry,) = downloads.cache_entries()
        downloads.clean(entry, keep_newest=True)
        assert [p.name for p in parts(cache)] == [f"{file.key}.part"]
        remote.go_on.set()
        task.result(30)
    assert (later / file.name).read_bytes() == remote.data


@pytest.mark.timeout(60)
def test_who_waits_for_a_file_of_another_run_can_be_stopped(
    slow: tuple[SlowFolder, urls.RemoteFile, Path],
) -> None:
    told = []

    def interrupt(here: int, total: int) -> None:
        told.append(here)
        if len(told) > 2:
            raise KeyboardInterrupt

    remote, file, later = slow
    cached = downloads.Cached("https://h/x")
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(cached.add_file, later, remote, file)
        assert remote.begun.wait(30)
        with pytest.raises(LockedError, match="another run"), waiting_at_most(0.2):
            cached.add("a" * 64, remote, [file], {})
        with pytest.raises(KeyboardInterrupt), downloads.telling(interrupt):
            cached.add("a" * 64, remote, [file], {})
        assert not task.done()
        remote.go_on.set()
        task.result(30)


def test_the_cache_is_listed_and_cleaned(server: FileServer, world: World, cache: Path) -> None:
    url = f"{server.url}/ckpt"
    old = Checkpoint.open(f"{url}?{KEY}").path
    remove_tasks(world.checkpoint, [OLD[3]])
    new = Checkpoint.open(url).path
    to_memory(world.checkpoint, "/bucket/ckpt")
    Checkpoint.open("memory://bucket/ckpt")
    runner = CliRunner()

    def listed() -> dict[str, Any]:
        done = runner.invoke(app, ["cache", "--json"])
        assert done.exit_code == 0, done.output
        return {entry["url"]: entry for entry in json.loads(done.stdout)["entries"]}

    entries = listed()
    assert set(entries) == {url, "memory://bucket/ckpt"}
    assert entries[url]["states"] == 2
    both = sum(
        {
            p.stat().st_ino: p.stat().st_size for p in new.parents[1].rglob("*") if p.is_file()
        }.values()
    )
    assert entries[url]["bytes"] == both
    done = runner.invoke(app, ["cache", f"{url}?{KEY}", "--clean-old", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["freed"] > 0
    assert not old.exists()
    assert validate(new) == []
    assert listed()[url]["states"] == 1
    done = runner.invoke(app, ["cache"])
    assert url in done.stdout
    assert "freed" not in done.stdout
    done = runner.invoke(app, ["cache", "--clean"])
    assert done.exit_code == 0, done.output
    assert done.stdout.endswith("B freed\n")
    assert listed() == {}
    assert runner.invoke(app, ["cache"]).stdout.endswith(": empty\n")
    assert runner.invoke(app, ["cache", f"{server.url}/none", "--clean"]).exit_code == 2


@pytest.mark.parametrize("harm", ["changed", "cut", "lost"])
def test_what_is_damaged_in_the_cache_says_how_it_is_fetched_again(
    server: FileServer, cache: Path, tmp_path: Path, harm: str
) -> None:
    url = f"{server.url}/ckpt"
    opened = Checkpoint.open(f"{url}?{KEY}")
    link = tmp_path / "followed"
    link.symlink_to(opened.path)
    file = opened.path / opened.tasks[OLD[0]].file
    data = file.read_bytes()
    file.chmod(0o644)
    file.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if harm == "changed" else b""))
    if harm == "lost":
        file.unlink()
    line = f"`vllm-vlora cache {url} --clean`"
    for place in (f"{url}?{KEY}", opened.path, link):
        with pytest.raises(CheckpointError, match=re.escape(line)) as caught:
            Checkpoint.open(place).load_task(OLD[0])
        assert "copy the checkpoint" not in str(caught.value)
        assert any(line in problem for problem in validate(place))
    done = CliRunner().invoke(app, line.strip("`").split()[1:])
    assert done.exit_code == 0, done.output
    assert validate(url) == []
    # Of a folder elsewhere there is another one, or none.
    copy = shutil.copytree(server.folder / "ckpt", tmp_path / "copy")
    (copy / file.relative_to(opened.path)).write_bytes(b"")
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        Checkpoint.open(copy).load_task(OLD[0])


def test_pull_of_a_url_is_a_copy_of_its_own(
    server: FileServer, world: World, tmp_path: Path
) -> None:
    pulled = pull_checkpoint(f"{server.url}/ckpt", tmp_path / "copy")
    assert content(pulled.path) == content(world.checkpoint)
    runner = CliRunner()
    assert runner.invoke(app, ["cache", "--clean"]).exit_code == 0
    assert validate(pulled.path) == []


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gcs"), ("abfs://b/x", "adlfs", "azure")],
)
def test_a_store_whose_package_is_missing_names_the_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(urls.RemoteError, match=rf"pip install 'vllm-vlora\[{extra}\]'"):
        urls.RemoteFolder(url)

"""S3 through s3fs, against moto's server: what a real client and store make of the places at URLs.

Where these packages are (``make test-beside`` brings them).
"""

from __future__ import annotations

import importlib.util
import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from edited_world import NEW, OLD, World
from typer.testing import CliRunner

from vllm_vlora import downloads
from vllm_vlora.adapters.peft_folder import open_adapter
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.sources import checkpoint_folder
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.downloads import Parts
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import AdapterError, CheckpointError, VLoRAError
from vllm_vlora.tools.cli import app

# Not at import: to the slow tests, none of which is here, that would be one that was skipped.
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("s3fs", "boto3", "moto")),
    reason="needs what requirements/beside.txt lists",
)

SECRET = "S3cr3tKey"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    import moto.server

    server = moto.server.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the store that is not the one under test; file systems are made anew."""
    import s3fs

    for name in ("AWS_PROFILE", downloads.OFFLINE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        downloads.CACHE_VARIABLE: str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(downloads, "_PAUSE_SECONDS", 0.01)
    s3fs.S3FileSystem.clear_instance_cache()
    import boto3

    # A session of its own: boto3's first one keeps the environment that it found.
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="models")
    yield client
    s3fs.S3FileSystem.clear_instance_cache()
    for key in keys(client):
        client.delete_object(Bucket="models", Key=key)


def keys(client: Any) -> list[str]:
    listed = client.list_objects_v2(Bucket="models")
    return [found["Key"] for found in listed.get("Contents", [])]


def upload(client: Any, folder: Path, place: str) -> None:
    """The files of a folder, and beside them the empty objects that consoles make for folders."""
    for path in (folder, *folder.rglob("*")):
        key = f"{place}/{path.relative_to(folder).as_posix()}".removesuffix("/.").lstrip("/")
        if path.is_file():
            client.put_object(Bucket="models", Key=key, Body=path.read_bytes())
        elif key:
            client.put_object(Bucket="models", Key=f"{key}/", Body=b"")


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World.at(tmp_path / "world")
    (world.checkpoint / "LICENSE.txt").write_bytes(b"")
    return world


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("place", ["", "team/my tasks+1%41/täsks?x=1"])
def test_a_checkpoint_in_a_bucket_is_the_folder_byte_for_byte(
    store: Any, world: World, place: str
) -> None:
    upload(store, world.checkpoint, place)
    url = f"s3://models/{place}"
    opened = Checkpoint.open(url)
    assert content(opened.path) == content(world.checkpoint)
    assert validate(url) == []
    # What was published since is seen, though s3fs has listed and held what was there.
    remove_tasks(world.checkpoint, [OLD[0]])
    upload(store, world.checkpoint, place)
    assert content(Checkpoint.open(url).path) == content(world.checkpoint)


def test_tasks_come_when_they_are_read(store: Any, world: World) -> None:
    upload(store, world.checkpoint, "ckpt")
    later = Checkpoint.open(checkpoint_folder("s3://models/ckpt", parts=Parts.TASKS_LATER))
    assert not list(later.path.glob("tasks/*"))
    task = later.load_task(OLD[1])
    assert set(task.modules) == set(Checkpoint.open(world.checkpoint).load_task(OLD[1]).modules)
    assert len(list(later.path.glob("tasks/*"))) == 1


def test_a_tree_of_adapters_is_compressed(store: Any, world: World, tmp_path: Path) -> None:
    names = dict(zip(("one", "zwei & drei+4%41", "deep/er/five"), OLD))
    for name, adapter in names.items():
        upload(store, world.adapter(adapter), f"team/adapters/{name}")
    store.put_object(Bucket="models", Key="team/adapters/", Body=b"")
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["compress", "s3://models/team/adapters", "-o", str(out), "--ratio", "2"]
    )
    assert done.exit_code == 0, done.output
    assert sorted(Checkpoint.open(out).tasks) == sorted(["one", "zwei & drei+4%41", "deep"])
    assert content(open_adapter("s3://models/team/adapters/one").path) == content(
        world.adapter(OLD[0])
    )
    upload(store, world.adapter(NEW[0]), "team/adapters/one")
    assert content(open_adapter("s3://models/team/adapters/one").path) == content(
        world.adapter(NEW[0])
    )
    # The name of an adapter begins with it.
    with pytest.raises(AdapterError, match="no such folder"):
        open_adapter("s3://models/team/adapters/on")


@pytest.mark.parametrize(
    ("url", "changed", "said"),
    [
        ("s3://models/none", {}, "is not a vllm-vlora checkpoint"),
        ("s3://nobucket/none", {}, "is not a vllm-vlora checkpoint"),
        (f"s3://AKIA:{SECRET}@models/x", {}, "takes no keys in the URL"),
        (f"s3://models/x?X-Amz-Signature={SECRET}", {}, "is not a vllm-vlora checkpoint"),
        ("s3://models/x", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials"),
        ("s3://models/x", {"AWS_SECRET_ACCESS_KEY": ""}, "no credentials"),
        ("s3://models/x", {"AWS_PROFILE": "nobody"}, r"ProfileNotFound.*the store's settings"),
        ("s3://models/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "nothing listens there"),
    ],
)
def test_what_is_wrong_is_said_in_a_line_without_keys(
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    url: str,
    changed: dict[str, str],
    said: str,
) -> None:
    for name, value in changed.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    with pytest.raises(CheckpointError, match=said) as caught:
        Checkpoint.open(url)
    shown = str(caught.value) + caplog.text
    assert "\n" not in str(caught.value)
    assert SECRET not in shown
    assert "AKIA" not in shown


def test_who_may_not_read_is_told_so(store: Any, endpoint: str, world: World) -> None:
    upload(store, world.checkpoint, "ckpt")
    with refused(endpoint):
        for opener in (Checkpoint.open, open_adapter):
            with pytest.raises(VLoRAError, match=r"access to .* is denied; check the credentials"):
                opener("s3://models/ckpt")


@contextmanager
def refused(endpoint: str) -> Iterator[None]:
    """Within the block the store looks who asks, and knows nobody."""

    def look_after(requests: bytes) -> None:
        url, kind = f"{endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, requests, kind)).close()

    look_after(b"0")
    try:
        yield
    finally:
        look_after(b"inf")

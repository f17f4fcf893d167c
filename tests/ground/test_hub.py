"""Finding folders and Hub repositories, without the network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from vllm_vlora.downloads import from_cache_alone
from vllm_vlora.errors import AdapterError, CheckpointError
from vllm_vlora.snapshots import fixed_ref, ref_name, resolve_snapshot

COMMIT = "1" * 40
FILES = {"adapter_config.json": b'{"r": 8}', "weights.bin": b"not wanted"}


class FakeHub(BaseHTTPRequestHandler):
    """Answers as the Hub does for org/adapter; org/gated is gated, everything else is missing."""

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        if "org/gated" in path:
            self.reply(403, b"{}", body, {"X-Error-Code": "GatedRepo"})
        elif path.startswith("/api/models/org/adapter/revision/missing"):
            self.reply(404, b"{}", body, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith("/api/models/org/adapter/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": self.etag(data)}
                for name, data in FILES.items()
            ]
            self.reply(200, json.dumps(tree).encode(), body)
        elif path.startswith("/api/models/org/adapter"):
            siblings = [{"rfilename": name} for name in FILES]
            info = {"id": "org/adapter", "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(info).encode(), body)
        elif path.startswith("/org/adapter/resolve/") and path.rpartition("/")[2] in FILES:
            data = FILES[path.rpartition("/")[2]]
            self.reply(200, data, body, {"ETag": f'"{self.etag(data)}"', "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def etag(data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def reply(
        self, status: int, data: bytes, body: bool, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


ADAPTER = "resolve_snapshot(ref, what='adapter', error=AdapterError, allow_patterns=['*.json'])"
MODEL = "model_place(ref, what='base model', error=AdapterError)"


def resolve_in_subprocess(
    ref: str, home: Path, call: str = ADAPTER, **environment: str
) -> tuple[bool, str]:
    """huggingface_hub reads its environment at import, so each case has a process of its own."""
    program = (
        "import sys\n"
        "from vllm_vlora.errors import AdapterError\n"
        "from vllm_vlora.snapshots import model_place, resolve_snapshot\n"
        "ref = sys.argv[1]\n"
        "try:\n"
        f"    print({call})\n"
        "except AdapterError as error:\n"
        "    print(error)\n"
        "    sys.exit(7)\n"
    )
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and not name.lower().endswith("_proxy")
    }
    done = subprocess.run(
        [sys.executable, "-c", program, ref],
        env={**kept, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 7), done.stderr
    return done.returncode == 0, done.stdout.strip()


def test_downloads_a_repository_then_serves_it_offline(endpoint: str, tmp_path: Path) -> None:
    found, folder = resolve_in_subprocess("org/adapter", tmp_path, HF_ENDPOINT=endpoint)
    assert found, folder
    assert Path(folder, "adapter_config.json").read_bytes() == FILES["adapter_config.json"]
    assert not Path(folder, "weights.bin").exists()

    found, again = resolve_in_subprocess("org/adapter", tmp_path, HF_HUB_OFFLINE="1")
    assert (found, again) == (True, folder)


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("org/missing", "no such repository"),
        ("org/gated", "gated"),
        ("org/adapter@missing", "no such revision"),
        ("org/a--b", "not a valid Hub id"),
    ],
)
def test_hub_errors_are_one_clear_line(endpoint: str, tmp_path: Path, ref: str, said: str) -> None:
    found, message = resolve_in_subprocess(ref, tmp_path, HF_ENDPOINT=endpoint)
    assert not found
    assert said in message
    assert repr(ref) in message
    assert len(message.splitlines()) == 1


def test_offline_and_unreachable_are_told_apart(tmp_path: Path) -> None:
    found, message = resolve_in_subprocess("org/adapter", tmp_path, HF_HUB_OFFLINE="1")
    assert not found
    assert "HF_HUB_OFFLINE" in message
    found, message = resolve_in_subprocess(
        "org/adapter", tmp_path, HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert not found
    assert "cannot be reached" in message


def test_a_model_is_asked_for_once_and_else_taken_from_the_cache(
    endpoint: str, tmp_path: Path
) -> None:
    found, place = resolve_in_subprocess("org/adapter", tmp_path, MODEL, HF_ENDPOINT=endpoint)
    assert (found, place) == (True, "org/adapter")
    for ref, said in (
        ("org/missing", "; the Hub has no such repository"),
        ("/a/b", ", and not a Hub id"),
    ):
        found, message = resolve_in_subprocess(ref, tmp_path, MODEL, HF_ENDPOINT=endpoint)
        assert not found
        assert message.startswith(f"base model '{ref}': no such folder{said}")
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    found, message = resolve_in_subprocess("org/model", tmp_path, MODEL, **closed)
    assert not found
    assert "cannot be reached (nothing listens there): check the network" in message
    found, message = resolve_in_subprocess("org/model", tmp_path, MODEL, HF_HUB_OFFLINE="1")
    assert not found
    assert "HF_HUB_OFFLINE is set: unset it" in message

    cached = tmp_path / "hub" / "models--org--model"
    snapshot = cached / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).touch()
    for without in (closed, {"HF_HUB_OFFLINE": "1"}):
        found, place = resolve_in_subprocess("org/model", tmp_path, MODEL, **without)
        assert (found, place) == (True, str(snapshot))
    assert resolve_in_subprocess(str(cached), tmp_path, MODEL) == (True, str(snapshot))


def test_a_folder_is_returned_absolute_and_wins_over_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "adapter").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    expected = tmp_path / "org" / "adapter"
    for ref in ("org/adapter", Path("org/adapter"), "org/../org/adapter", str(expected)):
        assert resolve_snapshot(ref, what="adapter", error=AdapterError) == expected
        assert ref_name(ref) == "adapter"


def test_a_linked_folder_keeps_the_name_the_user_wrote(tmp_path: Path) -> None:
    (tmp_path / "3f2a").mkdir()
    (tmp_path / "french").symlink_to("3f2a")
    assert resolve_snapshot(tmp_path / "french", what="x", error=AdapterError).name == "french"
    assert ref_name(tmp_path / "french") == "french"


@pytest.mark.parametrize(
    "ref",
    ["nothing", "/no/such/folder", "./org/x", "a//b", "here/b/c", "a/.b/c", "", "a b/c",
     "~nobody-here/x", "x" * 5000],
)  # fmt: skip
def test_what_is_neither_folder_nor_id_never_reaches_the_hub(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **_: asked.append(a))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint '.*': no such folder"):
        resolve_snapshot(ref, what="checkpoint", error=CheckpointError)
    assert asked == []


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    file.touch()
    with pytest.raises(AdapterError, match="is a file"):
        resolve_snapshot(file, what="adapter", error=AdapterError)


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the Hub was asked for: (repository, arguments); its answer is ``tmp_path``."""
    found: list[Any] = []

    def download(repo: str, **kwargs: object) -> str:
        found.append((repo, kwargs))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return found


def test_revision_and_patterns_reach_the_hub(tmp_path: Path, asked: list[Any]) -> None:
    found = resolve_snapshot(
        "org/name.v1@refs/pr/3", what="adapter", error=AdapterError, allow_patterns=["*.json"]
    )
    assert found == tmp_path
    assert asked == [("org/name.v1", {"revision": "refs/pr/3", "allow_patterns": ["*.json"]})]
    assert ref_name("org/name.v1@refs/pr/3") == "name.v1"


def test_where_the_cache_alone_is_meant_the_hub_is_not_asked(
    tmp_path: Path, asked: list[Any]
) -> None:
    with from_cache_alone():
        resolve_snapshot("org/x", what="checkpoint", error=CheckpointError)
    resolve_snapshot("org/x", what="checkpoint", error=CheckpointError)
    assert [arguments.get("local_files_only", False) for _, arguments in asked] == [True, False]


def test_a_folder_in_a_repository_is_fetched_alone(tmp_path: Path, asked: list[Any]) -> None:
    (tmp_path / "runs" / "fr").mkdir(parents=True)
    found = resolve_snapshot(
        "org/name/runs/fr@v2", what="adapter", error=AdapterError, allow_patterns=["a.json", "*.x"]
    )
    assert found == tmp_path / "runs" / "fr"
    patterns = ["runs/fr/a.json", "runs/fr/*.x"]
    assert asked == [("org/name", {"revision": "v2", "allow_patterns": patterns})]
    assert ref_name("org/name/runs/fr@v2") == "fr"
    with pytest.raises(AdapterError, match="no folder runs/de"):
        resolve_snapshot("org/name/runs/de", what="adapter", error=AdapterError)


def test_a_repository_in_the_cache_is_its_snapshot(tmp_path: Path) -> None:
    cached = tmp_path / "models--org--french-lora"
    for commit in ("aa", "bb"):
        (cached / "snapshots" / commit).mkdir(parents=True)
    assert resolve_snapshot(cached, what="adapter", error=AdapterError) == cached
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("bb\n")
    found = resolve_snapshot(cached, what="adapter", error=AdapterError)
    assert found == cached / "snapshots" / "bb"
    assert ref_name(cached) == ref_name(cached / "snapshots" / "aa") == "french-lora"


def test_a_full_cache_disk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: object, **kwargs: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(AdapterError, match="HF_HOME"):
        resolve_snapshot("org/name", what="adapter", error=AdapterError)


@pytest.mark.parametrize(
    ("ref", "fixed"),
    [
        ("org/name", f"org/name@{COMMIT}"),
        ("org/name@main", f"org/name@{COMMIT}"),
        (f"org/name@{COMMIT}", f"org/name@{COMMIT}"),
        ("org/name/inner/folder@v1", f"org/name/inner/folder@{COMMIT}"),
        ("/nowhere", "/nowhere"),
    ],
)
def test_a_branch_is_fixed_at_the_commit_that_it_was_resolved_to(ref: str, fixed: str) -> None:
    inner = ref.partition("@")[0].removeprefix("org/name").lstrip("/")
    snapshot = Path("/cache/models--org--name/snapshots", COMMIT, inner)
    assert fixed_ref(ref, snapshot) == fixed


def test_a_folder_is_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    assert fixed_ref("ckpt", tmp_path / "ckpt") == "ckpt"
    snapshot = tmp_path / "models--org--name" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    assert fixed_ref("models--org--name", snapshot) == str(snapshot)

"""``vllm-vlora ready`` against servers that are up, starting, without the plugin, or of other things."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from places import ROOT
from typer.testing import CliRunner

from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.tools.cli import app

CHECKPOINT = ROOT / "tests/data/format1"
TASKS = [*Checkpoint.open(CHECKPOINT).tasks]


def models(*names: str) -> bytes:
    return json.dumps({"data": [{"id": name} for name in names]}).encode()


@contextmanager
def answering(
    answer: Callable[[str, str], tuple[int, bytes]], elsewhere: str = ""
) -> Iterator[str]:
    """A server whose answers are made of the path and the Authorization header, and may be elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, data = answer(self.path, self.headers.get("Authorization") or "")
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if elsewhere:
                self.send_header("Location", elsewhere + self.path)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def ask(url: str, *arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["ready", *arguments, "--url", url])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


ANSWERS: dict[str, tuple[Callable[[str, str], tuple[int, bytes]], str]] = {
    "one task is missing": (lambda p, a: (200, models("base", *TASKS[1:])), "does not list"),
    "no plugin": (lambda p, a: (200, models("base")), "does not list"),
    "the engine is dead": (lambda p, a: (503 if p == "/health" else 200, b""), "answers with 503"),
    "a key is asked for": (lambda p, a: (401 if p != "/health" else 200, b""), "answers with 401"),
    "no JSON": (lambda p, a: (200, b"<html>"), "its list of models is none"),
    "other JSON": (lambda p, a: (200, b'{"data": [1]}'), "its list of models is none"),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_not_ready(kind: str) -> None:
    answer, said = ANSWERS[kind]
    with answering(answer) as url:
        code, output = ask(url, str(CHECKPOINT))
    assert code == 1
    assert said in output


def test_ready_with_every_task_and_the_servers_key(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(path: str, key: str) -> tuple[int, bytes]:
        asked.append((path, key))
        return 200, models("base", *TASKS)

    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    monkeypatch.setenv("VLLM_VLORA_CHECKPOINT", str(CHECKPOINT))
    with answering(answer) as url:
        code, output = ask(url)
        assert ask(f"{url}/", "--json")[0] == 0
    assert code == 0, output
    assert f"lists {len(TASKS)} tasks" in output
    assert "s3cret" not in output
    assert asked[:2] == [("/health", "Bearer s3cret"), ("/v1/models", "Bearer s3cret")]
    # Nobody listens any more.
    code, output = ask(url)
    assert code == 1
    assert "does not answer (nothing listens there)" in output


@pytest.mark.parametrize(
    "form", ["{host}", "http://{host}/v1", "{host}/v1/", "http://{host}/metrics"]
)
def test_the_address_that_clients_are_given_will_do(form: str) -> None:
    asked = []

    def answer(path: str, key: str) -> tuple[int, bytes]:
        asked.append(path)
        return 200, models(*TASKS)

    with answering(answer) as url:
        code, output = ask(form.format(host=url.removeprefix("http://")), str(CHECKPOINT))
    assert code == 0, output
    assert asked == ["/health", "/v1/models"]


@pytest.mark.parametrize("url", ["", "ftp://h", "http://h:port", "http://a b", "http://a..b"])
def test_what_is_no_address_is_refused(url: str) -> None:
    code, output = ask(url, str(CHECKPOINT))
    assert code == 2
    assert "is no address of a server; give http://HOST:PORT" in output
    assert output.count("\n") == 1


def test_a_key_is_for_the_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever it sends us on to does not get it, and one that no header can hold is not shown."""
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    asked = []

    def elsewhere(path: str, key: str) -> tuple[int, bytes]:
        asked.append(key)
        return 200, models(*TASKS)

    with answering(elsewhere) as other, answering(lambda p, k: (307, b""), other) as url:
        code, output = ask(url, str(CHECKPOINT))
    assert code == 0, output
    assert asked == ["", ""]
    monkeypatch.setenv("VLLM_API_KEY", "s3\ncret")
    code, output = ask(url, str(CHECKPOINT))
    assert code == 2
    assert "API key" in output
    assert "cret" not in output


def test_what_listens_there_may_be_no_web_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)
        greeter = threading.Thread(target=_greet, args=(server,))
        greeter.start()
        code, output = ask(f"127.0.0.1:{server.getsockname()[1]}", str(CHECKPOINT))
        greeter.join()
    assert code == 1
    assert "it does not answer (it does not speak HTTP)" in output


def _greet(server: socket.socket) -> None:
    caller, _ = server.accept()
    with caller:
        caller.recv(65536)
        caller.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")


def test_what_is_served_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_VLORA_CHECKPOINT", raising=False)
    assert ask("http://127.0.0.1:1")[0] == 2
    assert ask("http://127.0.0.1:1", str(tmp_path / "none"))[0] == 2

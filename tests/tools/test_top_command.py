"""``top`` against a real HTTP server that answers with the collector's own output."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from scrapes import busy_counters
from typer.testing import CliRunner

from vllm_vlora.errors import OptionError
from vllm_vlora.plugin.counters import DEVICE
from vllm_vlora.plugin.metrics import TaskMetrics
from vllm_vlora.tools.cli import app
from vllm_vlora.tools.server_metrics import metrics_url

pytest.importorskip("prometheus_client")


class Answering:
    """A server whose /metrics are of counters that a test may count on, or what a test sets."""

    def __init__(self) -> None:
        self.counters = busy_counters()
        self.shown = TaskMetrics()
        self.shown.model_name = "base"
        self.key: str | None = None
        self.text: str | None = None
        self.status = 200
        self.seen: list[tuple[str, str | None]] = []
        self.location: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        given = handler.headers.get("Authorization")
        self.seen.append((handler.path, given))
        if self.key is not None and given != f"Bearer {self.key}":
            handler.send_error(401)
            return
        handler.send_response(self.status)
        if self.location:
            handler.send_header("Location", self.location)
        handler.end_headers()
        handler.wfile.write((self.scrape() if self.text is None else self.text).encode())

    def scrape(self) -> str:
        from prometheus_client import CollectorRegistry, generate_latest

        self.shown.update(0, self.counters.snapshot(self.shown.seen(0)))
        registry = CollectorRegistry()
        registry.register(self.shown)
        return generate_latest(registry).decode()


@pytest.fixture
def server() -> Iterator[Answering]:
    server = Answering()
    yield server
    server.server.shutdown()
    server.server.server_close()


def run(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(app, ["top", *arguments], env={"VLLM_API_KEY": None, **environment})


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/metrics"])
def test_json_has_every_number(server: Answering, suffix: str) -> None:
    done = run(server.url + suffix, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert server.seen == [("/metrics", None)]
    assert found["url"] == f"{server.url}/metrics"
    assert found["model"] == "base"
    assert found["tasks"][0] == {"task": "sql", "requests": 3}
    (engine,) = found["engines"]
    assert 0 <= engine.pop("age_seconds") < 60
    zeros = dict.fromkeys(["memory", "model", "checkpoint", "load", "busy", "other"], 0)
    assert engine == {
        "engine": "0",
        "state": "0123456789ab",
        "capacity": 5,
        "waiting": 3,
        "tasks": {"device": 2, "host": 1, "catalogue": 100},
        "bytes": {"device": 40, "host": 20},
        "budget_bytes": {"device": 100},
        "requests": {"device": 3, "host": 0, "disk": 1, "remote": 1},
        "evictions": {"device": 1, "host": 0},
        "refusals": {**zeros, "memory": 1},
        "reloads": 1,
        "checkpoint_refusals": {**zeros, "checkpoint": 1},
        "loads": {
            "load": {"count": 2, "seconds": 0.35},
            "activate": {"count": 1, "seconds": 0.002},
            "fetch": {"count": 1, "seconds": 1.5},
        },
    }


def test_one_reading_as_a_table(server: Answering) -> None:
    server.counters.requested("\x1b[31mred", DEVICE)
    done = run(server.url, "--once")
    assert done.exit_code == 0, done.output
    for text in ("engine 0", "2 of 5", "40 B of 100 B", "66.7%",
                 "2, 175.0 ms each", "Asked for most", "sql", "\\x1b[31mred"):  # fmt: skip
        assert text in done.stdout, text
    assert "\x1b[31m" not in done.stdout
    assert "sql" not in run(server.url, "--once", "--tasks", "0").stdout


def test_the_key_is_sent_as_vllm_wants_it_and_to_nobody_else(server: Answering) -> None:
    server.key = "secret"
    done = run(server.url, "--json")
    assert done.exit_code == 2
    assert "401" in done.stderr
    assert "VLLM_API_KEY" in done.stderr
    assert run(server.url, "--json", VLLM_API_KEY="secret").exit_code == 0
    assert run(server.url, "--json", "--api-key", "secret").exit_code == 0
    other = Answering()
    try:
        other.status, other.location = 302, f"{server.url}/metrics"
        server.key = None
        assert run(other.url, "--json", "--api-key", "secret").exit_code == 0
        assert server.seen[-1] == ("/metrics", None)
    finally:
        other.server.shutdown()
        other.server.server_close()


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [
        ("<html>hello</html>", 200, "does not answer with metrics"),
        ("", 200, "has no metrics of vllm-vlora"),
        ("# TYPE vllm:x gauge\nvllm:x 1\n", 200, "has no metrics of vllm-vlora"),
        ("vllm:x{ 1\n", 200, "does not answer with metrics"),
        ("", 404, "answers 404"),
        ("", 500, "answers 500"),
    ],
)
def test_what_is_no_server_of_ours_is_said_in_one_line(
    server: Answering, text: str, status: int, said: str
) -> None:
    server.text, server.status = text, status
    done = run(server.url)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: ")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert server.url in done.stderr


def test_nobody_there(server: Answering) -> None:
    server.server.shutdown()
    server.server.server_close()
    done = run(server.url)
    assert done.exit_code == 2
    assert "does not answer (nothing listens there)" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_key_that_no_header_can_hold_is_not_shown(server: Answering) -> None:
    done = run(server.url, "--api-key", "sec\nret")
    assert done.exit_code == 2
    assert "API key" in done.stderr
    assert "sec" not in done.stderr.replace("vllm-vlora", "")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("localhost:8000", "http://localhost:8000/metrics"),
        ("https://h/models/v1", "https://h/models/metrics"),
        ("http://h/metrics/", "http://h/metrics"),
        ("http://[::1]:8000", "http://[::1]:8000/metrics"),
        ("http://h/x?token=1#y", "http://h/x/metrics"),
    ],
)
def test_the_address_of_the_metrics(given: str, url: str) -> None:
    assert metrics_url(given) == url


@pytest.mark.parametrize(
    "url",
    ["", "file:///etc/passwd", "http://", "http://h:port", "ftp://h", "http://a b", "http://[::1"],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(OptionError, match="is no address of a server"):
        metrics_url(url)


def test_live_it_shows_rates_survives_a_pause_and_ends_with_ctrl_c(server: Answering) -> None:
    screen, terminal = pty.openpty()
    command = [
        sys.executable,
        "-P",
        "-m",
        "vllm_vlora.tools",
        "top",
        server.url,
        "--interval",
        "0.3",
    ]
    process = subprocess.Popen(
        command, stdin=terminal, stdout=terminal, stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "60"},
    )  # fmt: skip
    os.close(terminal)
    shown = b""

    def until(wanted: bytes) -> None:
        nonlocal shown
        deadline, shown = time.monotonic() + 30, b""
        while wanted not in shown:
            assert time.monotonic() < deadline, shown
            shown += os.read(screen, 65536)

    try:
        until(b"engine 0")
        for _ in range(50):
            server.counters.requested("sql", DEVICE)
        until(b"/s")
        server.status = 500
        until(b"answers 500")
        server.status = 200
        until(b"engine 0")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(screen)

"""What the benchmark of watching and counting makes of what its servers did."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys

import httpx
import pytest
from places import BENCHMARKS, ROOT

# Programs there import each other by bare names.
sys.path.append(str(BENCHMARKS))

import watching
from watching import NEITHER, WATCHING, Turn

from vllm_vlora.plugin import following, metrics


def test_requests_a_second_and_cpu_of_a_request_and_ratios_of_turns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    turns = {
        WATCHING: [Turn(2.0, 3.0, []), Turn(4.0, 4.0, []), Turn(4.0, 4.0, [])],
        NEITHER: [Turn(1.0, 2.0, []), Turn(4.0, 2.0, []), Turn(2.0, 4.0, [])],
    }
    found = watching.figures(
        argparse.Namespace(requests=100, idle=4, often=20), turns, {WATCHING: 0.02, NEITHER: 0.012}
    )
    assert found["requests_per_second"][WATCHING]["p50"] == pytest.approx(25)
    assert found["cpu_milliseconds"][NEITHER]["rounds"] == pytest.approx([20, 20, 40])
    assert found["throughput_ratio"]["rounds"] == pytest.approx([0.5, 1.0, 0.5])
    assert found["cpu_ratio"]["rounds"] == pytest.approx([1.5, 2.0, 1.0])
    assert found["idle_cpu_milliseconds"] == pytest.approx({WATCHING: 5, NEITHER: 3})
    assert found["as_often_as_users_servers"] == pytest.approx(
        {"throughput_lost": 0.05, "cpu_more": 0.025, "idle_cpu_milliseconds": 0.1}
    )
    watching.print_figures(found)
    printed = capsys.readouterr().out
    for word in (WATCHING, NEITHER, "0.500 (p20", "1.500 (p20", "5.00%", "2.50%", "0.10 ms"):
        assert word in printed


def test_every_process_of_a_server_watches_as_often_as_it_is_told() -> None:
    # listing imports vLLM, and its constant is changed as the others are.
    program = (
        "from vllm_vlora.plugin import following, metrics; import sitecustomize\n"
        "print(following.PERIOD, metrics.INTERVAL, *sitecustomize._PERIODS)"
    )

    def periods(name: str) -> list[str]:
        environment = os.environ | watching._watching(argparse.Namespace(often=20), name)
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    look, ask, *modules = periods(WATCHING)
    assert float(look) == pytest.approx(following.PERIOD / 20)
    assert float(ask) == pytest.approx(metrics.INTERVAL / 20)
    assert float(periods(NEITHER)[1]) == pytest.approx(3600)
    for module in modules:
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()
        assert re.search(r"^(PERIOD|INTERVAL) = ", source, re.MULTILINE), module


@pytest.mark.parametrize("status", [200, 500])
def test_a_turn_in_which_metrics_failed_is_none(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/metrics":
            return httpx.Response(status)
        await asyncio.sleep(0.05)
        return httpx.Response(200, json={"choices": [{"token_ids": [7]}]})

    def client(url: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=url, transport=httpx.MockTransport(answer))

    monkeypatch.setattr(watching, "_client", client)
    turn = watching._ask_all("http://here", [("sql", [1])], together=1, length=1)
    if status == 200:
        assert asyncio.run(turn) == [[7]]
    else:
        with pytest.raises(httpx.HTTPStatusError, match="500"):
            asyncio.run(turn)

"""The serving benchmark's own arithmetic: loads, figures, report, arguments, comparator; no engine."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import run
from serving import correctness, engine, plot, program, report, settings
from serving.configurations import DIRECT, configuration
from serving.engine import late_kernels
from serving.figures import Trace, spread_of_ratios
from serving.loads import (
    Call,
    Job,
    Load,
    choose_tasks,
    generator_for,
    make_calls,
    zipf_probabilities,
)

from vllm_vlora.timing import percentile

ONE, EIGHT = Load(1, "uniform"), Load(8, "uniform")


# --- loads -----------------------------------------------------------------------------------------


def test_zipf_probabilities_fall_with_the_rank() -> None:
    p = zipf_probabilities(4)
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    assert p == pytest.approx([1 / harmonic, 1 / 2 / harmonic, 1 / 3 / harmonic, 1 / 4 / harmonic])


def test_zipf_draws_follow_the_law() -> None:
    load, count = Load(16, "zipf"), 40_000
    drawn = np.bincount(choose_tasks(load, count, generator_for(3)), minlength=16)
    expected = count * zipf_probabilities(16)
    # 15 degrees of freedom: a sum above 37.7 has a chance of one in a thousand, and the seed is fixed.
    assert ((drawn - expected) ** 2 / expected).sum() < 37.7


@pytest.mark.parametrize("count", [5, 8, 21])
def test_uniform_deals_every_task_before_any_comes_again(count: int) -> None:
    tasks = choose_tasks(EIGHT, count, generator_for(0))
    assert len(tasks) == count
    for start in range(0, count, 8):
        deal = tasks[start : start + 8]
        assert len(set(deal)) == len(deal)
        assert set(deal) <= set(range(8))


def test_calls_repeat_for_a_place_and_differ_between_places() -> None:
    def calls(*places: int) -> list[Call]:
        return make_calls([0, 1, 2], 6, 100, generator_for(7, *places))

    assert calls(0, 1) == calls(0, 1)
    assert calls(0, 1) != calls(1, 0)
    assert all(3 <= token < 100 for call in calls(0) for token in call.prompt)
    assert Job(calls(0), 1, 3).prompt_tokens == 18


# --- figures ---------------------------------------------------------------------------------------


def _trace(arrivals: list[list[float]], started: float = 0.0, ended: float = 10.0) -> Trace:
    tokens = [[0] * len(times) for times in arrivals]
    return Trace(started, ended, [started] * len(arrivals), arrivals, tokens)


def test_percentiles_are_linear_between_values() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([0.0, 10.0], 20) == 2.0
    assert percentile([7.0], 80) == 7.0


def test_the_decode_rate_leaves_out_steps_with_a_first_token() -> None:
    # Steps at 1 (first of both), 2, 3, 5 (first of the third call, and one more of the first), 6.
    trace = _trace([[1.0, 2.0, 3.0, 5.0], [1.0, 2.0, 3.0], [5.0, 6.0]])
    # 2 and 3 bring two tokens each in a second each, 6 brings one in a second.
    assert trace.decode_rate() == pytest.approx(5 / 3)
    assert trace.gaps() == [1.0, 1.0, 2.0, 1.0, 1.0, 1.0]
    assert trace.first_token_times() == [1.0, 1.0, 5.0]


def test_there_is_no_decode_rate_without_a_decode_step() -> None:
    assert _trace([[1.0], [2.0]]).decode_rate() is None


class _Backlog:
    """An engine whose core had done all steps, at ``stamps``, before the driver read the first."""

    def __init__(self, stamps: list[float]) -> None:
        self._stamps = iter(stamps)
        self.engine_core = SimpleNamespace(get_output=self._get_output)
        self.names: list[str] = []

    def _get_output(self) -> Any:
        return SimpleNamespace(timestamp=next(self._stamps))

    def add_request(self, name: str, *_: Any, **__: Any) -> None:
        self.names.append(name)

    def step(self) -> list[Any]:
        stamp = self.engine_core.get_output().timestamp
        token = SimpleNamespace(token_ids=[5], logprobs=None)
        return [
            SimpleNamespace(request_id=name, outputs=[token], finished=stamp == 10.5)
            for name in self.names
        ]


def test_tokens_come_when_the_core_had_them_and_not_when_they_are_read() -> None:
    backlog = _Backlog([10.0, 10.25, 10.5])
    driver = engine._Driver(SimpleNamespace(llm_engine=backlog), [])
    trace = driver.run(Job([Call(None, [3]), Call(None, [4])], max_tokens=3, concurrency=2))
    assert trace.arrivals == [[10.0, 10.25, 10.5]] * 2
    assert trace.decode_rate() == 8  # Two tokens in each quarter of a second.


def test_ratios_are_taken_round_by_round() -> None:
    # The machine was twice as slow in the second round: the ratio does not see it.
    ratios = spread_of_ratios([8.0, 4.0, 9.0], [10.0, 5.0, 10.0])
    assert ratios["rounds"] == pytest.approx([0.8, 0.8, 0.9])
    assert ratios["p50"] == pytest.approx(0.8)


# --- the report ------------------------------------------------------------------------------------


def _measured() -> report.Measurements:
    measured = report.Measurements()
    for name, step in (("base", 1.0), ("stock-N", 4.0), ("direct-k32", 2.0)):
        cell = measured.cell(configuration(name), EIGHT, requests=2, concurrency=2)
        for slower in (1.0, 2.0):
            unit = step * slower
            prefill = Job([Call(0, [5] * 10), Call(1, [5] * 10)], 1, 2)
            cell.add_prefill(prefill, _trace([[unit]] * 2, ended=unit))
            cell.add_decode(_trace([[unit, 2 * unit, 3 * unit]] * 2, ended=3 * unit))
        measured.memory[name] = [int(step * 1000)]
    measured.latencies["direct-k32"].cold += [0.010, 0.012]
    measured.latencies["direct-k32"].warm += [0.008, 0.009]
    return measured


def test_the_rows_hold_rates_ratios_and_units() -> None:
    results = json.loads(json.dumps(_measured().results()))
    assert results["schema_version"] == report.SCHEMA_VERSION
    rows = {row["configuration"]: row for row in results["rows"]}
    direct = rows["direct-k32"]
    assert set(direct) == {
        *("configuration", "tasks", "popularity", "requests", "concurrency", "inter_token_ms"),
        *(*report.RATES, "to_base", "to_stock"),
    }
    assert (direct["tasks"], direct["popularity"], direct["requests"]) == (8, "uniform", 2)
    # 20 prompt tokens in 2 s, then in 4 s; two tokens a step of 2 s, then of 4 s.
    assert direct[report.PREFILL]["rounds"] == [10.0, 5.0]
    assert direct[report.DECODE]["rounds"] == [1.0, 0.5]
    assert direct[report.OUTPUT]["p50"] == pytest.approx(0.75)
    assert direct[report.REQUESTS]["rounds"] == pytest.approx([1 / 3, 1 / 6])
    assert direct["inter_token_ms"] == {"p20": 2000, "p50": 3000, "p80": 4000, "count": 8}
    for rate in report.RATES:
        assert direct["to_base"][rate]["rounds"] == pytest.approx([0.5, 0.5])
        assert direct["to_stock"][rate]["rounds"] == pytest.approx([2.0, 2.0])


def test_rows_within_a_round_have_the_ratios_of_whole_rounds() -> None:
    """They are written after every cell, in case the run is ended."""
    measured = _measured()
    before = {row["configuration"]: row for row in measured.rows()}
    for key, cell in measured.cells.items():
        if key[0] == "base":
            for rate in report.RATES:
                cell.rates[rate].append(1.0)
    after = {row["configuration"]: row for row in measured.rows()}
    assert len(after) > 1
    for name, row in after.items():
        if name != "base":
            assert row["to_base"] == before[name]["to_base"]


def test_the_engines_rows_hold_memory_above_base_and_paired_latencies() -> None:
    rows = {row["configuration"]: row for row in _measured().results()["engines"]}
    assert rows["base"]["memory_above_base_bytes"] == 0
    assert rows["stock-N"]["memory_above_base_bytes"] == 3000
    assert rows["base"]["first_token_cold_ms"] is None
    direct = rows["direct-k32"]
    assert direct["first_token_cold_ms"]["p50"] == pytest.approx(11)
    assert direct["activation_ms"]["rounds"] == pytest.approx([2, 3])


def test_kernels_compiled_while_serving_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = pytest.importorskip("vllm.utils.jit_monitor")
    monkeypatch.setattr(monitor, "_mode", "error")  # Then it raises the text that it would log.
    event = {"backend": "Triton", "event": "kernel JIT compilation", "detail": "x=1"}
    lines = []
    for kernel in ("_shrink_kernel", "_core_kernel", "_shrink_kernel", "a.b.<lambda>"):
        with pytest.raises(RuntimeError) as raised:
            monitor._handle_jit_event(**event, fn_name=kernel)
        lines.append(f"WARNING 11-26 10:00:00 {raised.value}")
    measured = _measured()
    measured.compiled["direct-k32"].update(dict.fromkeys(late_kernels("\n".join(lines))))
    results = measured.results()
    names = ["_shrink_kernel", "_core_kernel", "a.b.<lambda>"]
    assert results["compiled_while_serving"] == {"direct-k32": names}
    report.print_results(results)
    assert f"compiled while serving, direct-k32: {', '.join(names)}" in capsys.readouterr().out


def test_a_configuration_that_failed_leaves_no_figures() -> None:
    measured = _measured()
    measured.drop("stock-N", "needs 99 GiB")
    results = measured.results()
    assert {row["configuration"] for row in results["rows"]} == {"base", "direct-k32"}
    assert all(row["to_stock"] is None for row in results["rows"])
    assert results["not_run"] == {"stock-N": "needs 99 GiB"}


def test_the_tables_show_every_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    measured = _measured()
    measured.drop("stock-N", "needs 99 GiB")
    report.print_results(measured.results())
    text = capsys.readouterr().out
    assert "8 tasks, uniform: 2 requests, 2 at a time" in text
    assert text.count("direct-k32") == 2
    assert "NOT RUN stock-N: needs 99 GiB" in text


def test_the_plot_draws_ratios_to_base_of_uniform_loads() -> None:
    measured = _measured()
    cell = measured.cell(configuration("direct-k32"), Load(8, "zipf"), requests=2, concurrency=2)
    cell.add_prefill(Job([Call(0, [5])], 1, 1), _trace([[1.0]]))
    cell.add_decode(_trace([[1.0, 2.0]]))
    lines = plot.lines_of(measured.rows(), report.PREFILL)
    assert set(lines) == {"stock-N", "direct-k32"}
    assert lines["direct-k32"] == [(8, *[pytest.approx(0.5)] * 3)]


# --- correctness -----------------------------------------------------------------------------------


def _answers(tokens: list[list[int]], runner_up: float = -3.0) -> Trace:
    """Answers whose every token t was followed in likelihood by t + 1, by so many nats."""
    trace = _trace([[0.0] * len(answer) for answer in tokens])
    trace.tokens = tokens
    trace.logprobs = [[{t: -0.5, t + 1: -0.5 + runner_up} for t in answer] for answer in tokens]
    return trace


def test_equal_tokens_pass() -> None:
    reference = _answers([[1, 2], [3, 4]])
    found = correctness.compare("x", _answers([[1, 2], [3, 4]]), reference, exact=True)
    assert found == {
        "tokens_compared": 4,
        "answers": 2,
        "parted_at_near_ties": 0,
        "largest_difference_nats": 0,
    }


@pytest.mark.parametrize("exact", [True, False])
def test_another_token_is_an_error(exact: bool) -> None:
    with pytest.raises(correctness.WrongResultError, match="task 0, prompt 1: token 1 is 5"):
        correctness.compare("x", _answers([[1, 2], [3, 5]]), _answers([[1, 2], [3, 4]]), exact)


def test_a_near_tie_passes_only_where_arithmetic_differs() -> None:
    found, reference = _answers([[1, 3, 9]]), _answers([[1, 2, 7]], runner_up=-0.01)
    found.logprobs[0][1] = {3: -0.48, 2: -0.53}
    assert correctness.compare("x", found, reference, exact=False) == {
        "tokens_compared": 2,
        "answers": 1,
        "parted_at_near_ties": 1,
        "largest_difference_nats": 0.03,
    }
    with pytest.raises(correctness.WrongResultError):
        correctness.compare("x", found, reference, exact=True)


def test_a_token_that_is_not_among_the_likeliest_is_no_near_tie() -> None:
    with pytest.raises(correctness.WrongResultError, match="inf nats"):
        correctness.compare("x", _answers([[9]]), _answers([[1]], runner_up=-0.01), exact=False)


@pytest.mark.parametrize("said", [{2: -0.3, 1: -0.8}, {2: -0.3, 5: -4.0}, {1: -0.2}])
def test_what_is_said_of_the_references_tokens_must_be_alike(said: dict[int, float]) -> None:
    """Also where another token is one that the reference hardly prefers less, or none is another."""
    found, reference = _answers([[2]]), _answers([[1]], runner_up=-0.01)
    found.tokens[0][0], found.logprobs[0][0] = max(said, key=lambda token: said[token]), said
    with pytest.raises(correctness.WrongResultError, match="token 0, 1, has logarithm"):
        correctness.compare("x", found, reference, exact=False)


def test_a_shorter_answer_is_an_error() -> None:
    with pytest.raises(correctness.WrongResultError, match="1 tokens instead of 2"):
        correctness.compare("x", _answers([[1]]), _answers([[1, 2]]), exact=True)


def test_a_reference_that_cannot_tell_is_refused() -> None:
    base, distinct = _answers([[1], [2]] * 4), [[[n], [n + 50]] for n in range(10, 14)]
    told_apart = _answers([answer for pair in distinct for answer in pair])
    correctness.check_reference("x", told_apart, base)
    told_apart.tokens[5] = told_apart.tokens[3]
    with pytest.raises(correctness.WrongResultError, match="answer alike"):
        correctness.check_reference("x", told_apart, base)
    told_apart.tokens[5] = base.tokens[1]
    with pytest.raises(correctness.WrongResultError, match="answer alike"):
        correctness.check_reference("x", told_apart, base)


# --- the comparator --------------------------------------------------------------------------------


@pytest.fixture
def punica() -> Any:
    """A CPU punica of vLLM's with a batch of 11 tokens of slots 2, none, 0 and 2 again."""
    from serving.punica_runs import use_punica_runs
    from vllm.lora.layers import LoRAMapping
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper = PunicaWrapperCPU(16, 16, torch.device("cpu"))
    ids = (30, 30, 30, 0, 0, 10, 10, 10, 10, 30, 30)
    mapping = LoRAMapping(ids, (30, 0, 10, 30), is_prefill=True)
    use_punica_runs(True)
    wrapper.update_metadata(mapping, [10, 20, 30], 3, 100)
    yield wrapper
    use_punica_runs(False)


TOKEN_SLOTS = [2, 2, 2, None, None, 0, 0, 0, 0, 2, 2]


def _stacked(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(3, 1, rows, columns)


def test_runs_give_every_token_its_own_adapter(punica: Any) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(11, 24), torch.randn(11, 20)
    a = (_stacked(4, 24), _stacked(4, 24))
    b = (_stacked(12, 4), _stacked(8, 4))
    expected = y.double()
    for token, slot in enumerate(TOKEN_SLOTS):
        if slot is None:
            continue
        for i, columns in enumerate((slice(0, 12), slice(12, 20))):
            update = b[i][slot, 0].double() @ (a[i][slot, 0].double() @ x[token].double())
            expected[token, columns] += 0.5 * update
    punica.add_lora_linear(y, x, a, b, 0.5, (12, 8))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_runs_of_sampled_rows_and_of_embeddings(punica: Any) -> None:
    torch.manual_seed(1)
    hidden, logits, a, b = torch.randn(4, 24), torch.randn(4, 30), _stacked(4, 24), _stacked(28, 4)
    expected = logits.double()
    for row, slot in enumerate([2, None, 0, 2]):
        if slot is not None:
            expected[row, :28] += b[slot, 0].double() @ a[slot, 0].double() @ hidden[row].double()
    punica.add_lora_logits(logits, hidden, a, b, 1.0)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)

    embedded, rows, b = torch.randn(11, 16), torch.randn(11, 4), _stacked(16, 4)
    expected = embedded.double()
    for token, slot in enumerate(TOKEN_SLOTS):
        if slot is not None:
            expected[token] += b[slot, 0].double() @ rows[token].double()
    punica.add_lora_embedding(embedded, rows, b, add_input=True)
    torch.testing.assert_close(embedded.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_new_batch_has_new_runs_and_stock_code_comes_back(punica: Any) -> None:
    from serving.punica_runs import use_punica_runs
    from vllm.lora.layers import LoRAMapping

    torch.manual_seed(2)
    x, a, b = torch.randn(3, 24), (_stacked(4, 24),), (_stacked(12, 4),)
    punica.add_lora_linear(torch.zeros(11, 12), torch.randn(11, 24), a, b, 1.0, (12,))
    use_punica_runs(False)
    punica.update_metadata(LoRAMapping((10, 20, 20), (10, 20), is_prefill=True), [10, 20], 3, 100)
    stock = torch.zeros(3, 12)
    punica.add_lora_linear(stock, x, a, b, 1.0, (12,))
    use_punica_runs(True)
    ours = torch.zeros(3, 12)
    punica.add_lora_linear(ours, x, a, b, 1.0, (12,))
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
    assert stock.abs().sum() > 0


# --- configurations and the command line -----------------------------------------------------------


def test_configurations_by_name() -> None:
    assert configuration("base").engine_arguments(128, 16) == {}
    assert configuration("stock-8").engine_arguments(128, 16)["max_loras"] == 8
    assert configuration("stock-N").engine_arguments(128, 16)["max_loras"] == 128
    assert configuration("punica-runs").engine == "stock-N"
    assert configuration("stock-8").environment({})["VLLM_PLUGINS"] == ""
    for name in DIRECT:
        environment = configuration(name).environment({name.removeprefix("direct-"): "/ckpt"})
        assert environment["VLLM_VLORA_MODE"] == "direct"
        assert environment["VLLM_VLORA_CHECKPOINT"] == "/ckpt"
        assert environment["VLLM_VLORA_OVERLAP"] == "off"
    beside = configuration("direct-k64-overlap")
    assert beside.engine != configuration("direct-k64").engine
    assert beside.checkpoint == "k64"
    assert beside.environment({"k64": ""})["VLLM_VLORA_OVERLAP"] == "on"
    assert configuration("stock-1").runs(ONE)
    assert not configuration("stock-1").runs(EIGHT)
    for name in ("stock-0", "stock", "direct-k16", "materialize-x"):
        with pytest.raises(ValueError, match=f"no configuration '{name}'; use base"):
            configuration(name)


def test_engines_are_packed_into_what_memory_holds() -> None:
    sizes = {"a": 4, "b": 3, "c": 5, "d": 9, "e": 1}
    assert settings.pack(sizes, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert settings.pack(sizes, 100) == [list("abcde")]
    assert settings.pack(sizes, 0) == [[name] for name in "abcde"]


def _script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "run.py"), "serving", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_the_help_says_what_is_measured() -> None:
    done = _script("--help")
    assert done.returncode == 0, done.stderr
    assert "materialize-8" in done.stdout
    assert "exit status is 1" in done.stdout


def _parse(*arguments: str) -> argparse.Namespace:
    return run.parse("serving", arguments)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--full"], "contradict each other"),
        (["--model", "/nowhere"], "neither tiny, small, 7b, 8b, 7b-16, 8b-16 nor a folder"),
        (["--configurations", "base,stockN"], "no configuration 'stockN'; use base"),
        (["--tasks", "8,0"], "'0' is not a whole number from 1 on"),
        (["--tasks", "8,two"], "'two' is not a whole number"),
        (["--popularity", "normal"], "use uniform or zipf"),
        (["--output-len", "1"], "at least 2"),
        (["--distinct", "3"], "at least 4"),
        (["--rank", "12"], "invalid choice"),
        (["--gpu-memory-utilization", "1.5"], "above 0 and at most 1"),
        (["--keep-gib", "-1"], "must not be negative"),
    ],
)
def test_wrong_arguments_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        _parse(*arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "can_plot", lambda: False)
    with pytest.raises(SystemExit):
        _parse("--plot", "x.png")
    assert "pip install matplotlib" in capsys.readouterr().err


def test_sizes_come_from_the_device_and_the_options() -> None:
    def resolved(*arguments: str, gpu: bool = False) -> settings.Settings:
        return settings.resolved(_parse(*arguments), gpu)

    default = resolved()
    assert (default.model, default.dtype) == ("small", "float32")
    assert [load.tasks for load in default.loads] == [1, 8, 32, 128]
    assert default.all_tasks == 128 + default.rounds * default.cold
    assert resolved("--full").loads[-1] == Load(1024, "zipf")
    assert resolved("--full", "--tasks", "8").tasks == 8
    assert resolved("--popularity", "zipf", "--tasks", "1,8").loads == (
        Load(1, "zipf"),
        Load(8, "zipf"),
    )
    on_gpu = resolved(gpu=True)
    assert (on_gpu.model, on_gpu.dtype, on_gpu.output_len) == ("7b", "bfloat16", 128)
    assert "punica-runs" not in on_gpu.configurations
    assert default.concurrent(Load(1024, "uniform")) == default.max_num_seqs
    assert default.requests(Load(1024, "uniform")) == 1024
    assert resolved("--concurrency", "16").requests(ONE) == 16


def test_the_device_may_rule_out_what_was_asked_for() -> None:
    def refuse(*arguments: str, gpu: bool) -> None:
        args = _parse(*arguments)
        program.refuse_impossible(settings.resolved(args, gpu), args.keep_gib, args.together)

    with pytest.raises(SystemExit, match="punica-runs is for CPU only"):
        refuse("--configurations", "base,punica-runs", gpu=True)
    with pytest.raises(SystemExit, match="--keep-gib is for CPU only"):
        refuse("--keep-gib", "8", gpu=True)
    with pytest.raises(SystemExit, match="--together is for a GPU only"):
        refuse("--together", "8", gpu=False)
    with pytest.raises(SystemExit, match="none of these configurations"):
        refuse("--configurations", "stock-1", "--tasks", "8", gpu=False)
    refuse(gpu=True)


def test_an_engine_s_memory_counts_slots_and_copies() -> None:
    chosen = settings.resolved(_parse("--tasks", "128"), gpu=False)
    config = {"num_attention_heads": 16, "hidden_size": 1024, "num_hidden_layers": 8}
    assert settings.kv_nbytes(chosen, config) == 2 * 8 * 1024 * 4 * (128 * 2 + 8) * 32

    def above_base(name: str) -> int:
        sizes = [
            settings.engine_nbytes(chosen, configuration(n), config, 10**8, 10**6)
            for n in (name, "base")
        ]
        return sizes[0] - sizes[1]

    all_tasks = chosen.all_tasks
    assert above_base("stock-N") == 2 * all_tasks * 4 * 10**6
    assert above_base("stock-8") == (8 + all_tasks) * 4 * 10**6
    assert above_base("materialize-8") == (8 * 4 + all_tasks * 2) * 10**6
    assert above_base("direct-nf4") == all_tasks * 4 * 10**6
    assert above_base("direct-k32") == 0

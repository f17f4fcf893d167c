"""Gathering moments of a tiny Llama, the files they are kept in, and the command."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from byte_tokenizer import make_byte_tokenizer
from typer.testing import CliRunner

from vllm_vlora.errors import DataError, OptionError, OutputError
from vllm_vlora.evaluation.calibrate import GatherOptions, calibrate, gather
from vllm_vlora.evaluation.texts import IGNORED, Row, read_examples, tokenize
from vllm_vlora.fitting.calibration import HEADER_FILE, Calibration, Settings, Source
from vllm_vlora.fitting.moments import FullMoment, LowRankMoment
from vllm_vlora.fitting.whitening import FROBENIUS
from vllm_vlora.tools.calibrate_command import calibrate as command

LAYER = "model.layers.1"
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
           "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=260,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).eval()


def rows_of_tokens() -> list[Row]:
    """Rows of several lengths: some scored at the end only, one whole, one not at all."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, prompt in ((9, 4), (5, 0), (12, 11), (7, 7), (9, 2)):
        ids = torch.randint(0, 260, (length,), generator=generator).tolist()
        rows.append(Row(ids, [IGNORED] * prompt + ids[prompt:]))
    return rows


def source_of(rows: list[Row], **changes: Any) -> Source:
    fields = {
        "max_tokens": None, "max_length": 64, "batch_size": 2, "gradients": True,
        "full": 2048, "directions": 8, "dtype": "float32", **changes,
    }  # fmt: skip
    reached = [max((i for i, t in enumerate(r.labels) if t != IGNORED), default=0) for r in rows]
    tokens = sum(len(row.input_ids) for row in rows)
    settings = Settings(**fields)
    return Source("tiny", ["data.jsonl"], "0" * 64, len(rows), tokens, sum(reached), settings, {})


def reference(rows: list[Row], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """E[x x^T] and E[g g^T] of one module in float64, row by row and without hooks' gradients.

    The gradient is that of a zero which is added to the module's output.
    """
    model = tiny_llama().double()
    module = model.get_submodule(name)
    inputs, gradients = [], []
    for row in rows:
        zero = torch.zeros(
            1, len(row.input_ids), module.out_features, dtype=torch.float64, requires_grad=True
        )

        def add_zero(_: Any, args: Any, output: Any, zero: torch.Tensor = zero) -> torch.Tensor:
            inputs.append(args[0].detach()[0])
            return output + zero

        handle = module.register_forward_hook(add_zero)
        logits = model(torch.tensor([row.input_ids])).logits[0]
        handle.remove()
        chosen = [i for i in range(1, len(row.labels)) if row.labels[i] != IGNORED]
        if chosen:
            scores = torch.log_softmax(logits, -1)
            loss = -sum(scores[i - 1, row.labels[i]] for i in chosen)
            gradients.append(torch.autograd.grad(loss, zero)[0][0, : chosen[-1]])
    x, g = torch.cat(inputs), torch.cat(gradients)
    return x.T @ x / len(x), g.T @ g / len(g)


@pytest.fixture(scope="module")
def gathered() -> Calibration:
    rows = rows_of_tokens()
    return gather(tiny_llama(), rows, source_of(rows), pad_id=0)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))


# --- gathering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", LINEARS)
@pytest.mark.parametrize("layer", [0, 1])
def test_moments_are_those_of_float64(gathered: Calibration, layer: int, linear: str) -> None:
    name = f"model.layers.{layer}.{linear}"
    inputs, gradients = reference(rows_of_tokens(), name)
    close(gathered.input_moment(name).dense(), inputs)
    output = gathered.output_moment(name)
    assert output is not None
    close(output.dense(), gradients)
    trace = float(inputs.diagonal().mean() * gradients.diagonal().mean())
    assert gathered.weight(name) == pytest.approx(trace, rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_batches_and_padding_change_nothing(gathered: Calibration, batch_size: int) -> None:
    rows = rows_of_tokens()
    other = gather(tiny_llama(), rows, source_of(rows, batch_size=batch_size), pad_id=259)
    for one, two in zip(gathered.moments, other.moments):
        close(one.dense(), two.dense())


def test_every_linear_is_seen_and_inputs_are_shared(gathered: Calibration) -> None:
    names = [f"model.layers.{i}.{linear}" for i in (0, 1) for linear in LINEARS]
    assert [module.name for module in gathered.modules] == [*names, "lm_head"]
    groups: dict[int, list[str]] = {}
    for module in gathered.modules:
        groups.setdefault(module.input, []).append(module.name.rpartition(".")[2])
    layer = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert list(groups.values()) == [*layer, *layer, ["lm_head"]]
    # Nine inputs, and an output for every module but the head.
    assert len(gathered.moments) == 9 + 14
    assert gathered.output_moment("lm_head") is None


def test_no_weight_gets_a_gradient_and_no_hook_stays() -> None:
    rows = rows_of_tokens()
    model = tiny_llama()
    gather(model, rows, source_of(rows), pad_id=0)
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_without_gradients_only_inputs_are_gathered(gathered: Calibration) -> None:
    rows = rows_of_tokens()
    source = source_of(rows, gradients=False)
    found = gather(tiny_llama(), rows, source, pad_id=0)
    assert len(found.moments) == 9
    for module in found.modules:
        assert module.output is None
        close(found.input_moment(module.name).dense(), gathered.input_moment(module.name).dense())
    name = f"{LAYER}.mlp.down_proj"
    assert found.metric(name).output is None
    assert found.weight(name) == pytest.approx(found.input_moment(name).mean)


def test_wide_moments_are_sketched(gathered: Calibration) -> None:
    rows = rows_of_tokens()
    found = gather(tiny_llama(), rows, source_of(rows, full=64, directions=48), pad_id=0)
    down = f"{LAYER}.mlp.down_proj"
    assert isinstance(found.input_moment(down), LowRankMoment)
    assert isinstance(found.output_moment(down), FullMoment)
    # 42 tokens span at most 42 dimensions, which 48 directions hold.
    close(found.input_moment(down).dense(), gathered.input_moment(down).dense())


def test_modules_that_share_an_input_only_at_times_are_refused() -> None:
    rows = rows_of_tokens()
    model = tiny_llama()
    attention = model.model.layers[0].self_attn
    calls: list[int] = []

    def copy_later(_: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        calls.append(1)
        return (args[0].clone(),) if len(calls) > 1 else None

    attention.k_proj.register_forward_pre_hook(copy_later)
    with pytest.raises(DataError, match=r"k_proj shares its input with .*q_proj in some batches"):
        gather(model, rows, source_of(rows), pad_id=0)


def test_an_overflow_names_the_module() -> None:
    rows = rows_of_tokens()
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(float("inf"))
    with pytest.raises(DataError, match=r"layers.0.mlp.down_proj: numbers overflow in float32"):
        gather(model, rows, source_of(rows, gradients=False), pad_id=0)


# --- meaning --------------------------------------------------------------------------------------


def test_the_metric_is_the_mean_squared_change_of_the_output() -> None:
    rows = rows_of_tokens()
    found = gather(tiny_llama(), rows, source_of(rows, gradients=False), pad_id=0)
    tight = Calibration(found.source, found.modules, found.moments, damping=1e-6)
    name = f"{LAYER}.mlp.down_proj"
    error = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    changes: list[torch.Tensor] = []
    model = tiny_llama()
    module = model.get_submodule(name)
    module.register_forward_hook(lambda _, args, y: changes.append(args[0][0].detach() @ error.T))
    for row in rows:
        model(torch.tensor([row.input_ids]))
    wanted = float(torch.cat(changes).square().sum(1).mean())
    norm = float(tight.metric(name).a(error.double()).square().sum())
    assert tight.weight(name) * norm == pytest.approx(wanted, rel=1e-3)


def test_both_sides_make_the_trace_of_the_curvature(gathered: Calibration) -> None:
    tight = Calibration(gathered.source, gathered.modules, gathered.moments, damping=1e-6)
    name = f"{LAYER}.self_attn.v_proj"
    inputs, gradients = reference(rows_of_tokens(), name)
    error = torch.randn(32, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = float(torch.trace(gradients @ error @ inputs @ error.T))
    metric = tight.metric(name)
    whitened = metric.b_t(metric.a(error).T)
    assert tight.weight(name) * float(whitened.square().sum()) == pytest.approx(wanted, rel=1e-3)


def test_modules_that_were_not_seen_are_measured_by_frobenius(gathered: Calibration) -> None:
    assert gathered.covers(f"{LAYER}.mlp.up_proj")
    assert not gathered.covers("model.embed_tokens")
    assert gathered.metric("model.embed_tokens") is FROBENIUS


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "model.language_model."])
def test_adapters_of_another_class_of_the_model_are_measured_alike(
    gathered: Calibration, prefix: str
) -> None:
    name = f"{LAYER}.mlp.up_proj"
    other = name.replace("model.", prefix, 1)
    assert gathered.covers(other)
    assert gathered.metric(other).input is gathered.metric(name).input
    assert gathered.weight(other) == gathered.weight(name)
    assert gathered.input_moment(other) is gathered.input_moment(name)
    assert gathered.output_moment(other) is gathered.output_moment(name)
    with pytest.raises(DataError, match=r"up_proj is 64 -> 128 "):
        gathered.check_shapes([(other, 64, 128)])


def test_modules_with_one_input_share_its_root(gathered: Calibration) -> None:
    q, v = (gathered.metric(f"{LAYER}.self_attn.{x}_proj") for x in "qv")
    assert q.input is v.input
    assert q.output is not v.output


def test_another_models_calibration_is_refused(gathered: Calibration) -> None:
    name = f"{LAYER}.mlp.up_proj"
    gathered.check_shapes([(name, 64, 96), ("unknown", 1, 1)])
    with pytest.raises(DataError, match=r"up_proj is 64 -> 128 .* 64 -> 96 .* of tiny"):
        gathered.check_shapes([(name, 64, 128)])


# --- files ----------------------------------------------------------------------------------------


@pytest.fixture
def saved(gathered: Calibration, tmp_path: Path) -> Path:
    gathered.save(tmp_path / "calibration")
    return tmp_path / "calibration"


def test_what_was_saved_is_read_back(gathered: Calibration, saved: Path) -> None:
    for path in (saved, saved / HEADER_FILE):
        opened = Calibration.open(path)
        assert opened.source == gathered.source
        assert opened.modules == gathered.modules
        for one, two in zip(gathered.moments, opened.moments):
            assert torch.equal(one.dense(), two.dense())
        name = f"{LAYER}.mlp.up_proj"
        assert opened.weight(name) == pytest.approx(gathered.weight(name))


def test_sketches_are_read_back_over_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_vlora.fitting.calibration.SHARD_BYTES", 40_000)
    rows = rows_of_tokens()
    found = gather(tiny_llama(), rows, source_of(rows, full=64, directions=8), pad_id=0)
    nbytes = found.save(tmp_path / "c")
    files = sorted((tmp_path / "c").glob("*.safetensors"))
    assert len(files) > 3
    assert all(file.stat().st_size < 50_000 for file in files)
    assert nbytes == sum(file.stat().st_size for file in (tmp_path / "c").iterdir())
    for one, two in zip(found.moments, Calibration.open(tmp_path / "c").moments):
        assert type(one) is type(two)
        assert torch.equal(one.dense(), two.dense())


def test_it_travels_to_other_processes(saved: Path) -> None:
    opened = Calibration.open(saved, damping=0.5)
    name = f"{LAYER}.mlp.up_proj"
    wanted = opened.metric(name).a(torch.eye(64))
    copy = pickle.loads(pickle.dumps(opened))
    assert torch.equal(copy.metric(name).a(torch.eye(64)), wanted)


def test_damping_is_chosen_on_opening(saved: Path) -> None:
    name = f"{LAYER}.mlp.up_proj"
    for damping in (0.01, 3.0):
        opened = Calibration.open(saved, damping=damping)
        s = opened.metric(name).a(torch.eye(64).double())
        moment = opened.input_moment(name)
        close(s @ s.T, moment.dense() / moment.mean + damping * torch.eye(64), 1e-5)
    with pytest.raises(ValueError, match="damping must be positive"):
        Calibration.open(saved, damping=0)


def test_only_a_calibration_is_replaced(gathered: Calibration, saved: Path) -> None:
    with pytest.raises(OutputError, match="exists"):
        gathered.save(saved)
    gathered.save(saved, force=True)
    (saved / HEADER_FILE).unlink()
    with pytest.raises(OutputError, match="did not write"):
        gathered.save(saved, force=True)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads((path / HEADER_FILE).read_text())
    change(data)
    (path / HEADER_FILE).write_text(json.dumps(data))


SHARD = "moments-00001.safetensors"


def flip_byte(path: Path) -> None:
    data = bytearray((path / SHARD).read_bytes())
    data[-1] ^= 1
    (path / SHARD).write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no header": (lambda p: (p / HEADER_FILE).unlink(), "is not a calibration"),
    "no JSON": (lambda p: (p / HEADER_FILE).write_text("{"), "not a JSON object"),
    "a list": (lambda p: (p / HEADER_FILE).write_text("[]"), "not a JSON object"),
    "version": (lambda p: edit(p, lambda d: d.update(format_version=2)), "upgrade vllm-vlora"),
    "no version": (lambda p: edit(p, lambda d: d.pop("format_version")), "whole number"),
    "field": (lambda p: edit(p, lambda d: d.update(more=1)), "unknown field `more`"),
    "no shard": (lambda p: (p / SHARD).unlink(), "the file is missing"),
    "cut": (lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:-4]), "the header says"),
    "flipped": (flip_byte, "SHA-256 differs"),
    "foreign": (lambda p: edit(p, lambda d: d["files"][0].update(file="../x")), "foreign file"),
    "twice": (lambda p: edit(p, lambda d: d["modules"].append(d["modules"][0])), "listed twice"),
    "no moment": (lambda p: edit(p, lambda d: d["modules"][0].update(input=99)), "no moment"),
    "width": (lambda p: edit(p, lambda d: d["modules"][0].update(d_in=63)), "no moment"),
    "file": (lambda p: edit(p, lambda d: d["moments"][0].update(file=7)), "moment 0 is impossible"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(saved: Path, damage: str) -> None:
    spoil, says = DAMAGE[damage]
    spoil(saved)
    with pytest.raises(DataError) as caught:
        Calibration.open(saved)
    assert says in str(caught.value)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.__setitem__("0.triangle", t["0.triangle"] / 0), "not finite"),
        (lambda t: t.__setitem__("0.triangle", t["0.triangle"][1:].clone()), "the header says"),
        (lambda t: t.__setitem__("0.triangle", t["0.triangle"].double()), "F64"),
        (lambda t: t.pop("0.triangle"), "0.triangle"),
    ],
)
def test_wrong_tensors_are_named_when_they_are_read(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], Any], says: str
) -> None:
    tensors = safetensors.torch.load_file(saved / SHARD)
    change(tensors)
    safetensors.torch.save_file(tensors, saved / SHARD)
    edit(saved, lambda d: d["files"][0].update(nbytes=(saved / SHARD).stat().st_size))
    opened = Calibration.open(saved, verify=False)
    with pytest.raises(DataError, match=says):
        opened.metric("model.layers.0.self_attn.q_proj")


# --- a model on disk, and the command -------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("data")
    chats = [
        {
            "messages": [
                {"role": "user", "content": "x" * n},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for n in (1, 9, 30)
    ]
    (folder / "a.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "b.txt").write_text("one paragraph of text\n\nand another\n")
    return [folder / "a.jsonl", folder / "b.txt"]


def test_files_take_turns_and_the_bound_holds(model: Path, data: list[Path]) -> None:
    options = GatherOptions(max_tokens=30, max_length=48, device="cpu")
    source = calibrate(model, data, options).source
    tokenizer = make_byte_tokenizer()
    first = [tokenize(read_examples(path)[0], tokenizer, 48) for path in data]
    assert source.examples == 2
    assert source.tokens == sum(len(row.input_ids) for row in first)
    assert source.gradient_tokens == sum(len(row.input_ids) - 1 for row in first)
    assert source.data == ["a.jsonl", "b.txt"]
    everything = calibrate(model, data, replace(options, max_tokens=None)).source
    assert everything.examples == 5


def test_data_without_a_loss_is_refused(model: Path, data: list[Path]) -> None:
    options = GatherOptions(max_length=8, device="cpu")
    with pytest.raises(DataError, match="no token of the data carries a loss"):
        calibrate(model, data[:1], options)
    inputs_only = calibrate(model, data[:1], replace(options, gradients=False))
    assert inputs_only.source.gradient_tokens == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", 0), ("max_length", 1), ("batch_size", 0), ("full", -1), ("directions", 0),
     ("dtype", "int3")],
)  # fmt: skip
def test_options_out_of_range_are_named(option: str, value: Any) -> None:
    with pytest.raises(OptionError, match=f"{option}.*{value}"):
        GatherOptions(**{option: value})


def run(*args: Any) -> Any:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(command)
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_the_command_writes_a_calibration(model: Path, data: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "calibration"
    done = run(model, *data, "-o", output, "--full", 64, "--directions", 16, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    opened = Calibration.open(output)
    assert told["modules"] == len(opened.modules) == 15
    assert told["moments"] == len(opened.moments) == 23
    # A layer's down_proj has a wide input, its gate_proj and up_proj wide outputs.
    assert told["full_moments"] == 23 - 6
    assert told["tokens"] == opened.source.tokens
    assert told["bytes"] == sum(file.stat().st_size for file in output.iterdir())
    again = run(model, *data, "-o", output)
    assert again.exit_code == 2
    assert "exists" in again.stderr
    replaced = run(model, *data, "-o", output, "--force", "--no-gradients")
    assert replaced.exit_code == 0
    assert "15 modules, 9 moments (9 whole)" in replaced.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("NO MODEL", "DATA"), "cannot be loaded"),
        (("MODEL", "none.jsonl"), "none.jsonl: No such file"),
        (("MODEL", "DATA", "--device", "abacus"), "device 'abacus' cannot be used"),
    ],
)
def test_what_the_command_refuses(
    model: Path, data: list[Path], tmp_path: Path, args: tuple[str, ...], says: str
) -> None:
    known = {"MODEL": model, "NO MODEL": data[0].parent, "DATA": data[0]}
    done = run(*(known.get(arg, arg) for arg in args), "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []

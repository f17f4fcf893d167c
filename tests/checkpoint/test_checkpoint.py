"""Checkpoint format 1: what is written reads back the same, and damage is found and named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pinned import assert_same_but_for_program
from places import DATA

from vllm_vlora.checkpoint.layout import basis_nbytes, task_nbytes
from vllm_vlora.checkpoint.manifest import (
    BASIS_INDEX_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    TASKS_FILE,
    is_checkpoint,
)
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.errors import CheckpointError, CheckpointVersionError, TaskNotFoundError
from vllm_vlora.quantize import FORMATS, SHARED_FORMATS, PackedMatrix, pack, unpack
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.stored import Basis, StoredModule
from vllm_vlora.task_ids import encode_task_id

DATA = DATA / "format1"
Q, V, EMBED = "model.layers.0.q_proj", "model.layers.0.v_proj", "model.embed_tokens"
SHAPES = {Q: (70, 48), V: (48, 130), EMBED: (200, 33)}  # d_in, d_out
K_OUT, K_IN = 12, 10


def orthonormal_rows(rows: int, cols: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(cols, rows, generator=generator))[0].T.contiguous()


def write_checkpoint(
    folder: Path,
    *,
    basis_format: str = "float32",
    shard_bytes: int = 1 << 30,
    seed: int = 0,
    scale: float = 2.0,
) -> dict[str, dict[str, StoredModule]]:
    """Three modules (two with a basis) and a task for each way of storing one."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    writer = CheckpointWriter(folder, "org/base", shard_bytes)
    bases = {}
    for name in (Q, V):
        d_in, d_out = SHAPES[name]
        u, v = orthonormal_rows(K_OUT, d_out, generator), orthonormal_rows(K_IN, d_in, generator)
        bases[name] = (u, v)
        writer.add_module(
            name, d_in, d_out, basis=Basis(pack(u, basis_format), pack(v, basis_format))
        )
    writer.add_module(EMBED, *SHAPES[EMBED], kind="embedding")

    def factors(name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        d_in, d_out = SHAPES[name]
        return (
            torch.randn(rank, d_in, generator=generator),
            torch.randn(d_out, rank, generator=generator),
        )

    tasks: dict[str, dict[str, StoredModule]] = {
        f"private-{format}": {
            name: encode_private(*factors(name, 3 + i), scale, format)
            for i, name in enumerate(SHAPES)
        }
        for format in SHARED_FORMATS
    }
    tasks["mixed/../Ü"] = {
        V: encode_joint(*factors(V, 2), scale, *bases[V], "bfloat16"),
        EMBED: encode_private(*factors(EMBED, 1), scale, "nf4-dq"),
        Q: encode_joint(*factors(Q, 9), scale, *bases[Q], "float32"),
    }
    head = {
        "base_model.model.score.weight": torch.randn(2, 5, generator=generator),
        "ids": torch.arange(3),
        "tiny": torch.tensor([0.5, 2.0]).to(torch.float8_e4m3fn),
    }
    for task_id, modules in tasks.items():
        writer.add_task(
            task_id,
            modules,
            original_nbytes=1000,
            error=0.25,
            adapter_config={"r": 3, "peft_type": "LORA"},
            source="org/adapter",
            extra=head if task_id.startswith("mixed") else None,
        )
    writer.finish("# card\n")
    return tasks


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "ckpt")
    return tmp_path / "ckpt"


def assert_same_matrix(got: PackedMatrix, want: PackedMatrix) -> None:
    assert (got.format, got.rows, got.cols) == (want.format, want.rows, want.cols)
    assert got.parts.keys() == want.parts.keys()
    for part, tensor in want.parts.items():
        assert torch.equal(got.parts[part], tensor)


# --- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("basis_format", SHARED_FORMATS)
def test_everything_written_reads_back_bit_for_bit(tmp_path: Path, basis_format: str) -> None:
    tasks = write_checkpoint(tmp_path / "c", basis_format=basis_format)
    checkpoint = Checkpoint.open(tmp_path / "c")
    assert checkpoint.base_model == "org/base"
    assert list(checkpoint.tasks) == list(tasks)
    assert {m.name: (m.d_in, m.d_out) for m in checkpoint.modules} == SHAPES
    assert [m.kind for m in checkpoint.modules] == ["linear", "linear", "embedding"]
    for task_id, modules in tasks.items():
        task = checkpoint.load_task(task_id)
        assert list(task.modules) == list(modules)
        for name, want in modules.items():
            got = task.modules[name]
            for field in ("representation", "format", "rank", "scale", "error", "core"):
                assert getattr(got, field) == getattr(want, field)
            assert got.matrices.keys() == want.matrices.keys()
            for side, matrix in want.matrices.items():
                assert_same_matrix(got.matrices[side], matrix)
    mixed = checkpoint.load_task("mixed/../Ü")
    assert {m.core for m in mixed.modules.values()} == {"dense", "factors", None}
    assert mixed.extra["ids"].tolist() == [0, 1, 2]
    assert mixed.extra["tiny"].float().tolist() == [0.5, 2.0]
    assert mixed.extra["base_model.model.score.weight"].shape == (2, 5)
    bases = dict(checkpoint.bases())
    assert bases.keys() == {Q, V}
    assert bases[Q].u.format == basis_format
    assert (bases[Q].u.rows, bases[Q].u.cols) == (K_OUT, SHAPES[Q][1])
    assert (bases[V].v.rows, bases[V].v.cols) == (K_IN, SHAPES[V][0])


def test_shards_hold_the_same_bases_and_an_index_names_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one")
    write_checkpoint(tmp_path / "many", shard_bytes=1)
    names = ["basis-00001-of-00002.safetensors", "basis-00002-of-00002.safetensors"]
    assert sorted(p.name for p in (tmp_path / "many").glob("basis*.safetensors")) == names
    index = json.loads((tmp_path / "many" / BASIS_INDEX_FILE).read_text())
    for file in names:
        tensors = safetensors.torch.load_file(tmp_path / "many" / file)
        assert {t for t, f in index["weight_map"].items() if f == file} == tensors.keys()
    one = dict(Checkpoint.open(tmp_path / "one").bases())
    many = dict(Checkpoint.open(tmp_path / "many").bases())
    assert one.keys() == many.keys()
    for name, basis in one.items():
        assert_same_matrix(many[name].u, basis.u)
        assert_same_matrix(many[name].v, basis.v)
    assert validate(tmp_path / "many") == []
    (tmp_path / "many" / BASIS_INDEX_FILE).write_text('{"weight_map": {"x": "y"}}')
    assert len(validate(tmp_path / "many")) == 1


def test_a_checkpoint_without_bases_has_no_basis_file(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, None)
    writer.add_module("m", 4, 3)
    writer.add_task(
        "t",
        {"m": encode_private(torch.ones(1, 4), torch.ones(3, 1), 1.0, "float16")},
        original_nbytes=14,
        error=0.0,
        adapter_config={},
    )
    writer.finish("")
    checkpoint = Checkpoint.open(tmp_path)
    assert not list(tmp_path.glob("basis*"))
    assert (checkpoint.basis_nbytes, checkpoint.base_model) == (0, None)
    assert dict(checkpoint.bases()) == {}
    assert validate(tmp_path) == []


@given(
    picks=st.lists(
        st.tuples(
            st.sampled_from(FORMATS), st.integers(1, 5), st.integers(1, 130), st.integers(1, 70)
        ),
        min_size=1,
        max_size=6,
    ),
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_sizes_are_predicted_exactly(
    tmp_path_factory: pytest.TempPathFactory,
    picks: list[tuple[str, int, int, int]],
    name: str,
) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    writer = CheckpointWriter(folder, None)
    modules = {}
    for i, (format, rank, d_in, d_out) in enumerate(picks):
        basis = None
        if i % 2 and format in SHARED_FORMATS:
            basis = Basis(pack(torch.ones(1, d_out), format), pack(torch.ones(1, d_in), format))
        writer.add_module(f"{name}{i}", d_in, d_out, basis=basis)
        modules[f"{name}{i}"] = encode_private(
            torch.ones(rank, d_in), torch.ones(d_out, rank), 1.0, format
        )
    record = writer.add_task("t", modules, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("")
    assert task_nbytes(record.segments, writer.modules) == (folder / record.file).stat().st_size
    real = sum(p.stat().st_size for p in folder.glob("basis*.safetensors"))
    assert basis_nbytes(writer.modules) == real


def test_sizes_count_lora_weights_and_bases_and_leave_heads_out(ckpt: Path) -> None:
    checkpoint = Checkpoint.open(ckpt)
    files = sum(p.stat().st_size for p in ckpt.rglob("*.safetensors"))
    head = 2 * 5 * 4 + 3 * 8 + 0 + 2
    assert checkpoint.nbytes == files - head
    assert checkpoint.original_nbytes == 1000 * len(checkpoint.tasks)
    assert checkpoint.ratio == pytest.approx(checkpoint.original_nbytes / checkpoint.nbytes)
    assert checkpoint.max_rank == 9


# --- the format, pinned --------------------------------------------------------------------------


def write_pinned(folder: Path) -> None:
    """What ``tests/data/format1`` was made with; small exact numbers, so no rounding anywhere."""
    writer = CheckpointWriter(folder, "org/base")
    u = torch.eye(4)[:2]
    v = torch.eye(6)[1:4]
    writer.add_module("m.q", 6, 4, basis=Basis(pack(u, "bfloat16"), pack(v, "bfloat16")))
    writer.add_module("m.v", 6, 5)
    writer.add_module("m.e", 3, 2, "embedding")
    count = torch.arange(1, 13, dtype=torch.float32)
    core = PackedMatrix("float16", 2, 3, {"values": (count[:6].view(2, 3) / 2).half()})
    left = PackedMatrix("float32", 1, 2, {"values": torch.tensor([[3.0, -1.0]])})
    right = PackedMatrix("float32", 1, 3, {"values": torch.tensor([[1.0, 0.0, 2.0]])})
    writer.add_task(
        "a/b",
        {
            "m.q": StoredModule("joint", "float16", 2, {"C": core}, 1.0, 0.125, "dense"),
            "m.v": encode_private(count[:6].view(1, 6), count[:5].view(5, 1), 0.5, "bfloat16"),
        },
        original_nbytes=42,
        error=0.25,
        adapter_config={"peft_type": "LORA", "r": 1},
        source="org/a",
        extra={"base_model.model.score.weight": count[:4].view(2, 2)},
    )
    writer.add_task(
        "Ü",
        {
            "m.q": StoredModule("joint", "float32", 1, {"A": right, "B": left}, core="factors"),
            "m.v": encode_private(
                127 * torch.eye(2, 6), torch.tensor([[127.0] * 5, [-254.0] * 5]).T, 2.0, "int8"
            ),
            "m.e": encode_private(torch.ones(1, 3), -torch.ones(2, 1), 1.0, "nf4"),
        },
        original_nbytes=64,
        error=0.0,
        adapter_config={},
    )
    writer.add_task(
        "nf4-dq",
        {"m.e": encode_private(torch.ones(1, 3), torch.ones(2, 1), 1.0, "nf4-dq")},
        original_nbytes=10,
        error=0.0,
        adapter_config={},
    )
    writer.finish("# card\n")


def test_a_checkpoint_of_format_1_reads_to_the_same_values_for_ever() -> None:
    checkpoint = Checkpoint.open(DATA)
    assert checkpoint.config.format_version == 1
    assert validate(DATA) == []
    assert list(checkpoint.tasks) == ["a/b", "Ü", "nf4-dq"]
    assert checkpoint.record("a/b").file == "tasks/a~2fb.safetensors"
    assert checkpoint.record("a/b").source == "org/a"
    assert checkpoint.record("a/b").adapter_config == {"peft_type": "LORA", "r": 1}
    bases = dict(checkpoint.bases())
    assert unpack(bases["m.q"].u).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    assert unpack(bases["m.q"].v).argmax(1).tolist() == [1, 2, 3]

    task = checkpoint.load_task("a/b")
    core = task.modules["m.q"]
    assert (core.representation, core.core, core.rank, core.error) == ("joint", "dense", 2, 0.125)
    assert unpack(core.matrices["C"]).tolist() == [[0.5, 1, 1.5], [2, 2.5, 3]]
    private = task.modules["m.v"]
    assert (private.representation, private.format, private.scale) == ("private", "bfloat16", 0.5)
    assert unpack(private.matrices["A"]).tolist() == [[1, 2, 3, 4, 5, 6]]
    assert unpack(private.matrices["B"]).tolist() == [[1, 2, 3, 4, 5]]
    assert task.extra["base_model.model.score.weight"].tolist() == [[1, 2], [3, 4]]

    task = checkpoint.load_task("Ü")
    assert unpack(task.modules["m.q"].matrices["A"]).tolist() == [[1, 0, 2]]
    assert unpack(task.modules["m.q"].matrices["B"]).tolist() == [[3, -1]]
    assert task.modules["m.v"].matrices["A"].parts["codes"].tolist() == [
        [127, 0, 0, 0, 0, 0],
        [0, 127, 0, 0, 0, 0],
    ]
    assert unpack(task.modules["m.v"].matrices["B"]).tolist() == [[127] * 5, [-254] * 5]
    nf4 = task.modules["m.e"].matrices["A"]
    assert nf4.parts["codes"][0, :3].tolist() == [0xFF, 0xF7, 0x77]
    assert unpack(nf4).tolist() == [[1, 1, 1]]
    assert unpack(checkpoint.load_task("nf4-dq").modules["m.e"].matrices["B"]).tolist() == [[1, 1]]


def test_the_writer_still_writes_format_1(tmp_path: Path) -> None:
    """Byte for byte, but for the version of the program in the manifest."""
    write_pinned(tmp_path)
    assert_same_but_for_program(tmp_path, DATA)


# --- identity ------------------------------------------------------------------------------------


def test_the_writer_writes_no_segment_that_no_reader_takes(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, None)
    writer.add_module(
        "q", 8, 8, basis=Basis(pack(torch.eye(8), "float32"), pack(torch.eye(8), "float32"))
    )
    core = StoredModule("joint", "trellis", 2, {"C": pack(torch.eye(8), "trellis")}, core="dense")
    with pytest.raises(AssertionError, match="'t', module q: number format 'trellis'"):
        writer.add_task("t", {"q": core}, original_nbytes=1, error=0.0, adapter_config={})
    assert not list(tmp_path.rglob("*.safetensors"))


def test_digest_is_the_same_for_the_same_weights_and_other_for_other(tmp_path: Path) -> None:
    def digests(folder: str, **options: Any) -> dict[str, str]:
        write_checkpoint(tmp_path / folder, **options)
        checkpoint = Checkpoint.open(tmp_path / folder)
        return {task: checkpoint.digest(task) for task in checkpoint.tasks}

    first = digests("a")
    assert len(set(first.values())) == len(first)
    assert digests("same") == first
    for other in (
        digests("weights", seed=1),
        digests("scale", scale=2.5),
        digests("basis", basis_format="bfloat16"),
    ):
        assert all(other[task] != first[task] for task in first)


def test_digest_does_not_depend_on_other_tasks(tmp_path: Path) -> None:
    def digest(folder: Path, ids: list[str]) -> str:
        folder.mkdir()
        writer = CheckpointWriter(folder, None)
        writer.add_module("m", 4, 3)
        for i, task_id in enumerate(ids):
            stored = encode_private(torch.full((1, 4), i + 1.0), torch.ones(3, 1), 1.0, "float32")
            writer.add_task(task_id, {"m": stored}, original_nbytes=1, error=0.0, adapter_config={})
        writer.finish("")
        return Checkpoint.open(folder).digest("t")

    assert digest(tmp_path / "a", ["t"]) == digest(tmp_path / "b", ["t", "u"])


# --- damage --------------------------------------------------------------------------------------

TASK = "private-float32"
TASK_PATH = f"tasks/{encode_task_id(TASK)}.safetensors"


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for task_id in checkpoint.tasks:
        checkpoint.load_task(task_id)
    list(checkpoint.bases())


def fails(folder: Path, *words: str, error: type[CheckpointError] = CheckpointError) -> None:
    """Reading fails with one line that holds every word, and ``validate`` reports it too."""
    with pytest.raises(CheckpointError) as caught:
        read_all(folder)
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    if error is CheckpointError and (folder / CONFIG_FILE).exists():
        assert message in validate(folder)


def digest_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)}


def edit_json(folder: Path, file: str, edit: Callable[[Any], None]) -> None:
    """Change a JSON file and, for tasks.json, its digest in the manifest."""
    data = json.loads((folder / file).read_text())
    edit(data)
    (folder / file).write_text(json.dumps(data))
    if file == TASKS_FILE:
        edit_json(folder, CONFIG_FILE, lambda c: c["tasks"].update(digest_of(folder / TASKS_FILE)))


def edit_task_tensors(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], None], task_id: str = TASK
) -> None:
    """Change a task file's tensors and every digest above it."""
    path = folder / "tasks" / f"{encode_task_id(task_id)}.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path)
    edit_json(folder, TASKS_FILE, lambda tasks: tasks[task_id].update(digest_of(path)))


def edit_basis(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "basis.safetensors"
    tensors = safetensors.torch.load_file(path)
    edit(tensors)
    safetensors.torch.save_file(tensors, path)
    edit_json(folder, CONFIG_FILE, lambda c: c["basis"][0].update(digest_of(path)))


@pytest.mark.parametrize("file", [TASK_PATH, "basis.safetensors", TASKS_FILE])
def test_truncated_missing_or_flipped_file_is_named(ckpt: Path, file: str) -> None:
    data = (ckpt / file).read_bytes()
    (ckpt / file).write_bytes(data[:-5])
    fails(ckpt, file, str(len(data)))
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    (ckpt / file).write_bytes(flipped)
    fails(ckpt, file, "SHA-256")
    (ckpt / file).unlink()
    fails(ckpt, file, "missing")
    (ckpt / file).mkdir()
    fails(ckpt, file)


def test_a_folder_without_manifest_is_no_checkpoint(ckpt: Path, tmp_path: Path) -> None:
    assert is_checkpoint(ckpt)
    (ckpt / CONFIG_FILE).unlink()
    assert not is_checkpoint(ckpt)
    fails(ckpt, str(ckpt), "not a vllm-vlora checkpoint")
    for folder in (ckpt, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError):
            validate(folder)


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_garbage_for_json_is_named(ckpt: Path, garbage: bytes) -> None:
    original = (ckpt / CONFIG_FILE).read_bytes()
    (ckpt / CONFIG_FILE).write_bytes(garbage)
    fails(ckpt, CONFIG_FILE)
    (ckpt / CONFIG_FILE).write_bytes(original)
    (ckpt / TASKS_FILE).write_bytes(garbage)
    edit_json(ckpt, CONFIG_FILE, lambda c: c["tasks"].update(digest_of(ckpt / TASKS_FILE)))
    fails(ckpt, TASKS_FILE)


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 10**9])
def test_a_newer_format_asks_for_an_upgrade_whatever_else_it_holds(
    ckpt: Path, version: int
) -> None:
    (ckpt / CONFIG_FILE).write_text(json.dumps({"format_version": version, "novel": [1]}))
    fails(ckpt, str(version), "upgrade", error=CheckpointVersionError)
    with pytest.raises(CheckpointVersionError):
        validate(ckpt)


@pytest.mark.parametrize("version", [0, -1, "1", None, 1.0, True])
def test_a_version_that_is_no_version_is_named(ckpt: Path, version: Any) -> None:
    edit_json(ckpt, CONFIG_FILE, lambda c: c.update(format_version=version))
    fails(ckpt, CONFIG_FILE, "format_version")


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda c: c.update(novel=1), "novel"),
        (lambda c: c.pop("modules"), "modules"),
        (lambda c: c["modules"][1].update(name=Q), Q),
        (lambda c: c["modules"][1].update(name=""), "unnamed"),
        (lambda c: c["modules"][0].update(d_in=0), Q),
        (lambda c: c["modules"][0].update(d_out="48"), "d_out"),
        (lambda c: c["modules"][0].update(kind="conv"), Q),
        (lambda c: c["modules"][0]["basis"].update(format="fp4"), Q),
        (lambda c: c["modules"][0]["basis"].update(k_in=0), Q),
        (lambda c: c["modules"][0]["basis"].update(k_out=49), Q),
        (lambda c: c["modules"][0]["basis"].update(k_out=11), "expected"),
        (lambda c: c["modules"][2].update(basis={"k_out": 1, "k_in": 1, "format": "int8"}), EMBED),
        (lambda c: c["modules"][0].update(basis=None), "no basis"),
        (lambda c: c["basis"].clear(), Q),
        (lambda c: c["basis"][0].update(file="../basis.safetensors"), "../basis"),
        (lambda c: c["basis"][0].update(file="/etc/passwd"), "/etc/passwd"),
        (lambda c: c["basis"][0].update(file="a\0b"), "leaves"),
        (lambda c: c["tasks"].update(file="x/../../tasks.json"), "x/../../tasks.json"),
        (lambda c: c["tasks"].update(file=""), "leaves"),
    ],
)
def test_a_manifest_that_contradicts_is_named(
    ckpt: Path, edit: Callable[[Any], None], word: str
) -> None:
    edit_json(ckpt, CONFIG_FILE, edit)
    fails(ckpt, str(ckpt), word)


@pytest.mark.parametrize(
    ("edit", "word"),
    [
        (lambda t: t["segments"][0].update(representation="flat"), "flat"),
        (lambda t: t["segments"][0].update(format="int2"), "int2"),
        (lambda t: t["segments"][0].update(rank=0), "rank"),
        (lambda t: t["segments"][0].update(rank=2), "private.A.float32.values"),
        (lambda t: t["segments"][0].update(rank=10**15), "rank"),
        (lambda t: t["segments"][0].update(scale="1"), "scale"),
        (lambda t: t["segments"][0].update(novel=1), "novel"),
        (lambda t: t["segments"][0].update(module=3), "module 3"),
        (lambda t: t["segments"][0].update(module=-1), "module -1"),
        (lambda t: t["segments"][0].update(module=1), "module 1"),
        (lambda t: t["segments"][2].update(representation="joint", core="dense"), "no basis"),
        (lambda t: t["segments"][0].update(representation="joint"), "core"),
        (lambda t: t["segments"].pop(), "private.A.float32.values"),
        (lambda t: t.update(file="../x"), "../x"),
        (lambda t: t.update(file="tasks/private-int8.safetensors"), "private-int8"),
        (lambda t: t.update(extra={"head": ["F32", [1]]}), "head"),
        (lambda t: t.update(extra={"head": ["Q7", [1]]}), "Q7"),
        (lambda t: t.pop("segments"), "segments"),
        (lambda t: t.update(adapter_config=[]), "adapter_config"),
    ],
)
def test_a_task_record_that_contradicts_is_named(
    ckpt: Path, edit: Callable[[Any], None], word: str
) -> None:
    edit_json(ckpt, TASKS_FILE, lambda tasks: edit(tasks[TASK]))
    fails(ckpt, word)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-1e999"])
def test_a_scale_that_is_not_finite_is_refused(ckpt: Path, number: str) -> None:
    text = (ckpt / TASKS_FILE).read_text()
    (ckpt / TASKS_FILE).write_text(text.replace('"scale":2.0', f'"scale":{number}', 1))
    edit_json(ckpt, CONFIG_FILE, lambda c: c["tasks"].update(digest_of(ckpt / TASKS_FILE)))
    fails(ckpt, TASKS_FILE)


@pytest.mark.parametrize("task_id", ["", "x" * 300, "a\nb"])
def test_an_impossible_task_id_is_refused(ckpt: Path, task_id: str) -> None:
    edit_json(ckpt, TASKS_FILE, lambda tasks: tasks.update({task_id: tasks.pop(TASK)}))
    fails(ckpt, TASKS_FILE, "task id")


NAME = "private.A.float32.values"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(NAME), [NAME, "missing"]),
        (lambda t: t.update(novel=torch.ones(1)), ["novel", "unexpected"]),
        (lambda t: t[NAME].__setitem__(5, float("nan")), [NAME, "NaN"]),
        (lambda t: t[NAME].__setitem__(5, float("-inf")), [NAME, "NaN or infinity"]),
        (lambda t: t.update({NAME: t[NAME].half()}), [NAME, "float16"]),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), [NAME, "expected"]),
        (lambda t: t.update({NAME: t[NAME].view(1, -1)}), [NAME, "expected"]),
    ],
)
def test_damage_inside_a_task_file_is_named(
    ckpt: Path, edit: Callable[[Any], None], words: list[str]
) -> None:
    edit_task_tensors(ckpt, edit)
    fails(ckpt, TASK_PATH, *words)


def test_damage_in_scales_and_heads_is_found(ckpt: Path) -> None:
    part = "private.B.nf4.scales"
    edit_task_tensors(ckpt, lambda t: t[part].fill_(float("nan")), "private-nf4")
    fails(ckpt, part, "NaN")
    head = "extra.base_model.model.score.weight"
    write_checkpoint(ckpt)
    edit_task_tensors(ckpt, lambda t: t.update({head: t[head][:1].clone()}), "mixed/../Ü")
    fails(ckpt, "score.weight", "expected")
    nan = torch.full((2,), float("nan")).to(torch.float8_e4m3fn)
    write_checkpoint(ckpt)
    edit_task_tensors(ckpt, lambda t: t.update({"extra.tiny": nan}), "mixed/../Ü")
    fails(ckpt, "tiny", "NaN")


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda t: t.pop(f"{Q}.U.values"), [Q]),
        (lambda t: t.update(novel=torch.ones(1)), ["novel", "unexpected"]),
        (lambda t: t[f"{V}.V.values"].fill_(float("nan")), [f"{V}.V.values", "NaN"]),
        (lambda t: t.update({f"{V}.V.values": torch.ones(2, 3)}), [f"{V}.V.values", "expected"]),
    ],
)
def test_damage_inside_a_basis_is_named(
    ckpt: Path, edit: Callable[[Any], None], words: list[str]
) -> None:
    edit_basis(ckpt, edit)
    fails(ckpt, *words)


def test_a_file_that_is_no_safetensors_is_named(ckpt: Path) -> None:
    (ckpt / TASK_PATH).write_bytes(b"\xff" * 64)
    edit_json(ckpt, TASKS_FILE, lambda t: t[TASK].update(digest_of(ckpt / TASK_PATH)))
    fails(ckpt, TASK_PATH, "safetensors")


def test_an_unknown_task_is_named_with_the_tasks_there_are(ckpt: Path) -> None:
    checkpoint = Checkpoint.open(ckpt)
    for call in (checkpoint.record, checkpoint.load_task, checkpoint.digest):
        with pytest.raises(TaskNotFoundError, match=r"no task 'nope'; it has: private-float32"):
            call("nope")


# --- validate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis_format", SHARED_FORMATS)
def test_validate_finds_nothing_in_a_sound_checkpoint(tmp_path: Path, basis_format: str) -> None:
    write_checkpoint(tmp_path / "c", basis_format=basis_format)
    seen: list[tuple[int, int]] = []
    assert (
        validate(tmp_path / "c", progress=lambda _, done, total: seen.append((done, total))) == []
    )
    assert seen == [(i, len(SHARED_FORMATS) + 2) for i in range(1, len(SHARED_FORMATS) + 3)]


def test_validate_reports_every_damaged_task_and_a_skew_basis(ckpt: Path) -> None:
    edit_task_tensors(ckpt, lambda t: t.pop(NAME))
    edit_task_tensors(ckpt, lambda t: t.update(novel=torch.ones(1)), "private-int8")
    edit_basis(ckpt, lambda t: t[f"{Q}.U.values"].mul_(1.01))
    problems = validate(ckpt)
    assert len(problems) == 3
    assert "not orthonormal" in problems[0]
    assert Q in problems[0]
    assert NAME in problems[1]
    assert "novel" in problems[2]

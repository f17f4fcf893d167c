"""Format 2: bits by row, rows of a basis, flat tasks, quantised cores. Files, and what is served."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from format2_world import (
    CLUSTERS,
    FLAT,
    K_IN,
    K_OUT,
    MODULES,
    WIDTHS,
    bases_of,
    write_world,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pinned import assert_same_but_for_program
from places import DATA, ROOT

from vllm_vlora.checkpoint.export import export_all
from vllm_vlora.checkpoint.layout import basis_nbytes, task_nbytes
from vllm_vlora.checkpoint.manifest import CONFIG_FILE, TASKS_FILE
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.validation import validate
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.editing.removing import remove_tasks
from vllm_vlora.errors import CheckpointError
from vllm_vlora.plugin.direct import DirectPath
from vllm_vlora.plugin.direct_slots import DirectSlots
from vllm_vlora.plugin.identity import task_path
from vllm_vlora.plugin.layouts import LayerLayout, Run, SliceLayout
from vllm_vlora.plugin.memory import plan_memory
from vllm_vlora.plugin.resident import ResidentStore
from vllm_vlora.plugin.slots import SlotWriter
from vllm_vlora.quantize import (
    SHARED_FORMATS,
    PackedMatrix,
    narrow_row_nbytes,
    pack,
    row_nbytes,
    unpack,
)
from vllm_vlora.representations.decode import decode, relative_error
from vllm_vlora.representations.joint import encode_joint
from vllm_vlora.representations.private import encode_narrow, encode_private
from vllm_vlora.representations.stored import Basis, FlatBasis, StoredModule
from vllm_vlora.task_ids import encode_task_id
from vllm_vlora.triton_kernels.direct import add_direct

DATA = DATA / "format2"
DOCUMENT = ROOT / "docs" / "format.md"
CPU = torch.device("cpu")


@pytest.fixture
def world(tmp_path: Path) -> Checkpoint:
    write_world(tmp_path / "ckpt")
    return Checkpoint.open(tmp_path / "ckpt")


def decoded(checkpoint: Checkpoint, task_id: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bases = bases_of(checkpoint)
    return {
        name: decode(stored, bases.get((name, stored.representation)))
        for name, stored in checkpoint.load_task(task_id).modules.items()
    }


def delta_by_hand(
    stored: StoredModule, bases: dict[tuple[str, str], Basis], name: str
) -> torch.Tensor:
    """delta_W in float64 as the format's page has it, from unpacked matrices alone."""
    side = {key: unpack(matrix).double() for key, matrix in stored.matrices.items()}
    if stored.representation == "private":
        return stored.scale * side["B"].T @ side["A"]
    basis = bases[name, stored.representation]
    u, v = unpack(basis.u).double(), unpack(basis.v).double()
    if stored.representation == "flat":
        a = v.view(K_IN + 1, stored.rank, -1)
        b = u.view(K_OUT + 1, stored.rank, -1)
        a = a[0] + sum(z * component for z, component in zip(side["A"][0], a[1:]))
        b = b[0] + sum(z * component for z, component in zip(side["B"][0], b[1:]))
        return stored.scale * b.T @ a
    if stored.rows is not None:
        u, v = u[stored.rows[0] : stored.rows[1]], v[stored.rows[2] : stored.rows[3]]
    core = side["C"] if stored.core == "dense" else side["B"].T @ side["A"]
    if stored.core == "dense" and stored.format not in ("float32", "float16", "bfloat16"):
        left, sigma, right = torch.linalg.svd(core)
        r = stored.rank
        core = left[:, :r] @ torch.diag(sigma[:r]) @ right[:r]
    return stored.scale * u.T @ core @ v


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", SHARED_FORMATS)
@pytest.mark.parametrize("shard_bytes", [1, 1 << 30])
def test_everything_written_reads_back_bit_for_bit(
    tmp_path: Path, basis: str, shard_bytes: int
) -> None:
    tasks = write_world(tmp_path / "c", basis=basis, shard_bytes=shard_bytes)
    checkpoint = Checkpoint.open(tmp_path / "c")
    assert checkpoint.config.format_version == 2
    for task_id, modules in tasks.items():
        task = checkpoint.load_task(task_id)
        assert list(task.modules) == list(modules)
        for name, want in modules.items():
            got = task.modules[name]
            assert replace(got, matrices={}) == replace(want, matrices={})
            assert got.matrices.keys() == want.matrices.keys()
            for side, matrix in want.matrices.items():
                assert (got.matrices[side].rows, got.matrices[side].cols) == (
                    matrix.rows,
                    matrix.cols,
                )
                for part, tensor in matrix.parts.items():
                    assert torch.equal(got.matrices[side].parts[part], tensor)
    bases = bases_of(checkpoint)
    assert bases.keys() == {("q", "joint"), ("o", "joint"), ("q", "flat"), ("v", "flat")}
    assert dict(checkpoint.bases()).keys() == WIDTHS.keys()
    for name, rank in FLAT.items():
        flat = bases[name, "flat"]
        assert isinstance(flat, FlatBasis)
        assert (flat.rank, flat.k_out, flat.k_in, flat.u.format) == (rank, K_OUT, K_IN, basis)
    assert validate(tmp_path / "c") == []


def test_a_task_takes_the_bytes_of_its_bits(world: Checkpoint) -> None:
    record = world.record("two bits")
    tensors = safetensors.torch.load_file(world.path / record.file)
    assert tensors.keys() == {
        f"private.{side}.nf4-dq.{part}"
        for side in "AB"
        for part in ("codes2", "scale_codes", "scale_range")
    }
    data = sum(t.nbytes for t in tensors.values())
    rows = {"o": 3, "q": 1}
    assert data == sum(
        count * narrow_row_nbytes(cols, 2) for name, count in rows.items() for cols in MODULES[name]
    )
    assert task_nbytes(record.segments, world.modules) == record.nbytes


@given(
    picks=st.lists(
        st.tuples(
            st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)).filter(sum),
            st.integers(1, 130),
            st.integers(1, 70),
        ),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 2**31),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_bits_round_trip_in_the_bytes_predicted(
    tmp_path_factory: pytest.TempPathFactory,
    picks: list[tuple[tuple[int, int, int], int, int]],
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("bits")
    generator = torch.Generator().manual_seed(seed)
    writer, modules = CheckpointWriter(folder, None), {}
    for i, (bits, d_in, d_out) in enumerate(picks):
        writer.add_module(f"m{i}", d_in, d_out)
        rank = sum(bits)
        a, b = (
            torch.randn(rank, d_in, generator=generator),
            torch.randn(d_out, rank, generator=generator),
        )
        modules[f"m{i}"] = encode_narrow(a, b, 1.0, bits)
    record = writer.add_task("t", modules, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.config.format_version == 1 + any(b[1] + b[2] > 0 for b, _, _ in picks)
    assert task_nbytes(record.segments, writer.modules) == (folder / record.file).stat().st_size
    for name, stored in checkpoint.load_task("t").modules.items():
        for side, matrix in modules[name].matrices.items():
            assert torch.equal(unpack(stored.matrices[side]), unpack(matrix))


def test_sizes_of_flat_bases_are_predicted_exactly(world: Checkpoint) -> None:
    real = sum(p.stat().st_size for p in world.path.glob("basis*.safetensors"))
    assert basis_nbytes(world.modules) == real == world.basis_nbytes


def test_digests_tell_bits_rows_and_flat_bases_apart(tmp_path: Path) -> None:
    def digests(
        folder: str, change: Callable[[Any], None] | None = None, **options: Any
    ) -> dict[str, str]:
        write_world(tmp_path / folder, **options)
        if change is not None:
            edit_json(tmp_path / folder, TASKS_FILE, change)
        checkpoint = Checkpoint.open(tmp_path / folder)
        return {task: checkpoint.digest(task) for task in checkpoint.tasks}

    first = digests("a")
    assert digests("same") == first
    assert len(set(first.values())) == len(first)
    moved = digests("rows", lambda t: t["rows"]["segments"][1].update(rows=[0, 3, 2, 5]))
    assert [task for task in first if moved[task] != first[task]] == ["rows"]
    # The tensors are named by their bits, so here the file would not fit; the digest need not know.
    other = digests("bits", lambda t: t["narrow"]["segments"][0].update(bits=[1, 2, 2]))
    assert [task for task in first if other[task] != first[task]] == ["narrow"]
    assert digests("basis", basis="bfloat16")["flat"] != first["flat"]


def test_copied_tasks_keep_their_bytes_on_a_basis_that_grew(
    world: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "grown").mkdir()
    writer = CheckpointWriter(tmp_path / "grown", "org/base")
    bases = bases_of(world)
    # Another order of modules, and more rows at the end of o's basis.
    for name in ("new", *reversed(MODULES)):
        basis, flat = bases.get((name, "joint")), bases.get((name, "flat"))
        assert flat is None or isinstance(flat, FlatBasis)
        if name == "o":
            assert basis is not None
            basis = Basis(*(_grown(matrix) for matrix in (basis.u, basis.v)))
        writer.add_module(name, *MODULES.get(name, (5, 6)), basis=basis, flat=flat)
    for task_id in world.tasks:
        writer.copy_task(world, task_id)
    writer.finish("")
    grown = Checkpoint.open(tmp_path / "grown")
    assert validate(grown.path) == []
    assert list(grown.tasks) == list(world.tasks)
    for task_id, record in world.tasks.items():
        assert (grown.path / record.file).read_bytes() == (world.path / record.file).read_bytes()
        wanted = decoded(world, task_id)
        for name, (a, b) in decoded(grown, task_id).items():
            assert torch.equal(a, wanted[name][0])
            assert torch.equal(b, wanted[name][1])
    rows = [s.rows for s in grown.record("dense int8").segments]
    assert rows == [(0, 7, 0, 7), None]
    (world.path / world.record("flat").file).write_bytes(b"")
    other = CheckpointWriter(tmp_path / "other", None)
    for module in world.modules:
        flat = bases.get((module.name, "flat"))
        assert flat is None or isinstance(flat, FlatBasis)
        other.add_module(
            module.name,
            module.d_in,
            module.d_out,
            basis=bases.get((module.name, "joint")),
            flat=flat,
        )
    with pytest.raises(CheckpointError, match="copy the checkpoint again"):
        other.copy_task(world, "flat")


def _grown(matrix: PackedMatrix) -> PackedMatrix:
    """The matrix with four more orthonormal rows."""
    rows = torch.cat([unpack(matrix), torch.randn(4, matrix.cols)])
    rows[-4:] = torch.linalg.qr(rows.T)[0].T[-4:]
    return pack(rows, "float32")


def test_what_format_1_can_say_is_written_as_format_1(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, None)
    writer.add_module("m", 8, 6, basis=Basis(pack(torch.eye(6), "nf4"), pack(torch.eye(8), "nf4")))
    a, b = torch.randn(2, 8), torch.randn(6, 2)
    tasks = {
        "four bits": encode_narrow(a, b, 1.0, (2, 0, 0)),
        "core": encode_joint(a, b, 1.0, torch.eye(6), torch.eye(8), "int8"),
    }
    for task_id, stored in tasks.items():
        writer.add_task(task_id, {"m": stored}, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("")
    texts = [(tmp_path / file).read_text() for file in (CONFIG_FILE, TASKS_FILE)]
    assert json.loads(texts[0])["format_version"] == 1
    assert not any(word in text for text in texts for word in ('"bits"', '"rows"', '"flat"'))
    assert validate(tmp_path) == []


# --- the format, pinned --------------------------------------------------------------------------


def write_pinned(folder: Path) -> None:
    """What ``tests/data/format2`` was made with; every value is exact."""
    writer = CheckpointWriter(folder, "org/base")
    eye = torch.eye(6)
    count = torch.arange(1, 13, dtype=torch.float32)
    writer.add_module(
        "m.q",
        6,
        4,
        basis=Basis(pack(torch.eye(4)[[0, 1, 0]], "bfloat16"), pack(eye[1:5], "bfloat16")),
    )
    components = [count.view(2, 6), torch.eye(2, 6)]
    flat_u = torch.cat([torch.ones(2, 5), torch.eye(2, 5), 2 * torch.eye(2, 5)])
    writer.add_module(
        "m.v",
        6,
        5,
        flat=FlatBasis(pack(flat_u, "float16"), pack(torch.cat(components), "float16"), 2),
    )

    def packed(format: str, rows: list[list[float]]) -> PackedMatrix:
        return pack(torch.tensor(rows), format)

    # The two middle values of 2-bit rows are those of NF4: -0.284 and 0.338.
    codes = torch.full((3, 32), 0x77, dtype=torch.uint8)
    codes[0, :3] = torch.tensor([0x01, 0x23, 0x45])
    codes[1] = 0x7F
    codes[1, :3] = torch.tensor([0x01, 0x35, 0x7A])
    codes[2] = 0xBB
    codes[2, :3] = torch.tensor([0x04, 0xBF, 0xF0])
    scales = {
        "scale_codes": torch.zeros(3, 1, dtype=torch.uint8),
        "scale_range": torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[4.0, 0.0]]]),
    }
    narrow = {
        "A": PackedMatrix("nf4-dq", 3, 6, {"codes": codes, **scales}),
        "B": PackedMatrix("nf4-dq", 3, 5, {"codes": codes.clone(), **scales}),
    }
    rows = {"A": packed("float32", [[1.0, 0.0, 2.0]]), "B": packed("float32", [[3.0, -1.0]])}
    loadings = {"A": packed("float16", [[2.0]]), "B": packed("float16", [[0.5, -1.0]])}
    tasks = {
        "bits": {"m.v": StoredModule("private", "nf4-dq", 3, narrow, 0.5, bits=(1, 1, 1))},
        "rows": {
            "m.q": StoredModule("joint", "float32", 1, rows, core="factors", rows=(1, 3, 0, 3))
        },
        "flat": {
            "m.v": StoredModule("flat", "float16", 2, loadings),
            "m.q": encode_private(count[:6].view(1, 6), count[:4].view(4, 1), 0.5, "bfloat16"),
        },
    }
    for task_id, modules in tasks.items():
        writer.add_task(task_id, modules, original_nbytes=42, error=0.25, adapter_config={})
    writer.finish("# card\n")


def test_a_checkpoint_of_format_2_reads_to_the_same_values_for_ever() -> None:
    checkpoint = Checkpoint.open(DATA)
    assert checkpoint.config.format_version == 2
    assert validate(DATA) == []
    narrow = checkpoint.load_task("bits").modules["m.v"]
    assert (narrow.bits, narrow.rank, narrow.scale) == ((1, 1, 1), 3, 0.5)
    a = unpack(narrow.matrices["A"])
    book = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
            -0.28444138169288635, -0.18477343022823334, 0.0, 0.24611230194568634,
            0.33791524171829224]  # fmt: skip
    assert a[0].tolist() == book[:6]
    assert a[1].tolist() == [2 * v for v in (book[0], book[1], book[3], book[5], book[6], book[7])]
    assert a[2].tolist() == [-4.0, 4 * book[4], 4 * book[8], 4.0, 4.0, -4.0]
    assert torch.equal(unpack(narrow.matrices["B"]), a[:, :5])

    core = checkpoint.load_task("rows").modules["m.q"]
    assert (core.rows, core.core, core.rank) == ((1, 3, 0, 3), "factors", 1)
    # Rows 1 and 2 of U transposed are outputs 1 and 0, rows 0 to 2 of V inputs 1 to 3.
    update = torch.zeros(4, 6)
    update[1, 1:4] = 3 * torch.tensor([1.0, 0.0, 2.0])
    update[0, 1:4] = -1 * torch.tensor([1.0, 0.0, 2.0])
    a, b = decoded(checkpoint, "rows")["m.q"]
    assert torch.equal(b @ a, update)

    flat = checkpoint.load_task("flat").modules["m.v"]
    assert (flat.representation, flat.rank, flat.bits, flat.rows) == ("flat", 2, None, None)
    a, b = decoded(checkpoint, "flat")["m.v"]
    assert a.tolist() == [[3, 2, 3, 4, 5, 6], [7, 10, 9, 10, 11, 12]]
    assert b.T.tolist() == [[-0.5, 1, 1, 1, 1], [1, -0.5, 1, 1, 1]]


def test_the_bytes_of_narrow_codes() -> None:
    file = Checkpoint.open(DATA).record("bits").file
    tensors = safetensors.torch.load_file(DATA / file)
    # Places 0 1 3 5 ... of the eight: upper bits 00 00 01 01 10 10 ..., lowest 0 1 0 1 0 1 ...
    three = bytes(tensors["private.A.nf4-dq.codes3"].tolist())
    # Elements 0 1 2 3 4 5 then padding: 7 F 7 F ..., that is places 4 7 4 7 ...
    assert three.hex() == "05abbb" + "bb" * 13 + "5555" + "55" * 6
    # Codes 0 4 B F | F 0 B B | B ...: places 0 1 2 3 | 3 0 2 2 | 2 ...
    two = bytes(tensors["private.A.nf4-dq.codes2"].tolist())
    assert two.hex() == "1bca" + "aa" * 14


def test_the_writer_still_writes_format_2(tmp_path: Path) -> None:
    """Byte for byte, but for the version of the program in the manifest."""
    write_pinned(tmp_path)
    assert_same_but_for_program(tmp_path, DATA)


# --- the reader on the format's page -------------------------------------------------------------


def documented_reader() -> Callable[[Path], Any]:
    text = DOCUMENT.read_text(encoding="utf-8")
    (code,) = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names: dict[str, Any] = {}
    exec(compile(code, str(DOCUMENT), "exec"), names)
    return names["read"]


@pytest.mark.parametrize(
    "folder", [*(f"format{version}" for version in range(1, 6)), "world", "nf4-dq"]
)
def test_the_documented_reader_reads_what_this_package_decodes(tmp_path: Path, folder: str) -> None:
    path = DATA.parent / folder
    if not folder.startswith("format"):
        path = tmp_path / "ckpt"
        write_world(path, basis="float32" if folder == "world" else folder)
    checkpoint = Checkpoint.open(path)
    seen = set()
    for task_id, name, delta in documented_reader()(path):
        a, b = decoded(checkpoint, task_id)[name]
        np.testing.assert_allclose(delta, (b @ a).numpy(), rtol=1e-4, atol=1e-4)
        seen.add((task_id, name))
    assert seen == {
        (task_id, checkpoint.modules[segment.module].name)
        for task_id, record in checkpoint.tasks.items()
        for segment in record.segments
    }


def test_the_digests_on_the_page_are_those_of_the_examples() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for folder, task_id in (("format1", "a/b"), ("format2", "rows"), ("format2", "flat")):
        assert f"`{Checkpoint.open(DATA.parent / folder).digest(task_id)}`" in text


# --- damage --------------------------------------------------------------------------------------


def digest_of(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "nbytes": len(data)}


def edit_json(folder: Path, file: str, edit: Callable[[Any], None]) -> None:
    data = json.loads((folder / file).read_text())
    edit(data)
    (folder / file).write_text(json.dumps(data))
    if file == TASKS_FILE:
        edit_json(folder, CONFIG_FILE, lambda c: c["tasks"].update(digest_of(folder / TASKS_FILE)))


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for task_id in checkpoint.tasks:
        checkpoint.load_task(task_id)
    list(checkpoint.shared())


def fails(folder: Path, *words: str) -> None:
    """Reading fails with one line that holds every word, and ``validate`` reports it too."""
    with pytest.raises(CheckpointError) as caught:
        read_all(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert message in validate(folder)


def segment(task_id: str, place: int = 0, **fields: Any) -> Callable[[Any], None]:
    return lambda tasks: tasks[task_id]["segments"][place].update(fields)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (segment("narrow", bits=[2, 1, 1]), ["'narrow'", "bits [2, 1, 1]", "rank 5"]),
        (segment("narrow", bits=[7, -1, -1]), ["bits [7, -1, -1]"]),
        (segment("narrow", bits=[2, 3]), ["bits"]),
        (segment("narrow", bits=[2, 1, 2.5]), ["bits"]),
        (segment("narrow", bits=None), ["private.A.nf4-dq.codes"]),
        (segment("narrow", bits=[1, 2, 2]), ["private.A.nf4-dq.codes", "expected"]),
        (segment("narrow", format="nf4"), ["bits by row"]),
        (segment("rows", bits=[1, 0, 0]), ["bits by row"]),
        (segment("rows", rows=[0, 13, 0, 6]), ["[0, 13, 0, 6]", "(12, 10)"]),
        (segment("rows", rows=[4, 4, 0, 6]), ["[4, 4, 0, 6]"]),
        (segment("rows", rows=[-1, 3, 0, 6]), ["[-1, 3, 0, 6]"]),
        (segment("rows", rows=[0, 4, 6, 0]), ["[0, 4, 6, 0]"]),
        (segment("rows", rows=[0, 4, 0]), ["rows"]),
        (segment("rows", rows=[0, 5, 0, 6]), ["joint.B.float32.values", "expected"]),
        (segment("rows", rows=None), ["joint.A.float32.values", "expected"]),
        (segment("rows", 1, rank=4), ["rank 4 exceeds the core"]),
        (segment("plain", rows=[0, 1, 0, 1]), ["rows of a basis"]),
        (segment("flat", rank=3), ["rank 3", "flat basis"]),
        (segment("flat", format="nf4"), ["loadings"]),
        (segment("flat", module=1), ["no flat basis"]),
        (segment("flat", rows=[0, 1, 0, 1]), ["rows of a basis"]),
        (segment("plain", representation="flat"), ["loadings"]),
        (segment("plain", flat=1), ["flat"]),
    ],
)
def test_a_segment_that_contradicts_is_named(
    world: Checkpoint, edit: Callable[[Any], None], words: list[str]
) -> None:
    edit_json(world.path, TASKS_FILE, edit)
    fails(world.path, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rank": 0}, ["module q", "flat basis"]),
        ({"k_in": 0}, ["module q", "flat basis"]),
        ({"k_out": -1}, ["flat.k_out"]),
        ({"format": "fp4"}, ["module q", "flat basis"]),
        ({"k_out": K_OUT + 1}, ["q.flatU.values", "expected"]),
        ({"rank": "3"}, ["rank"]),
        ({"novel": 1}, ["novel"]),
    ],
)
def test_a_flat_basis_that_contradicts_is_named(
    world: Checkpoint, change: dict[str, Any], words: list[str]
) -> None:
    edit_json(world.path, CONFIG_FILE, lambda c: c["modules"][0]["flat"].update(change))
    if change == {"rank": "3"} or "k_out" not in change:
        fails(world.path, *words)
    else:
        # The tasks' loadings have another number first; the basis says so by itself, too.
        assert any(all(word in line for word in words) for line in validate(world.path))


def test_a_flat_basis_that_is_missing_is_named(world: Checkpoint) -> None:
    path = world.path / "basis.safetensors"
    tensors = safetensors.torch.load_file(path)
    del tensors["v.flatV.values"]
    safetensors.torch.save_file(tensors, path)
    edit_json(world.path, CONFIG_FILE, lambda c: c["basis"][0].update(digest_of(path)))
    fails(world.path, "no basis for module v")


@pytest.mark.parametrize("value", [None, [1, 0, 0], [0, 1, 0, 1]])
@pytest.mark.parametrize("field", ["bits", "rows"])
def test_format_1_has_none_of_it(tmp_path: Path, field: str, value: Any) -> None:
    folder = tmp_path / "ckpt"
    shutil.copytree(DATA.parent / "format1", folder)
    edit_json(folder, TASKS_FILE, lambda t: t["a/b"]["segments"][1].update({field: value}))
    fails(folder, "unknown field", field)


def test_format_1_has_no_flat_basis(tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    shutil.copytree(DATA.parent / "format1", folder)
    for value in (None, {"rank": 1, "k_out": 1, "k_in": 1, "format": "int8"}):
        edit_json(folder, CONFIG_FILE, lambda c: c["modules"][1].update(flat=value))  # noqa: B023
        fails(folder, "unknown field", "flat")


def test_each_range_of_rows_is_orthonormal_by_itself(world: Checkpoint) -> None:
    assert validate(world.path) == []
    path = world.path / "basis.safetensors"

    def scale(rows: slice, side: str) -> list[str]:
        write_world(world.path)
        tensors = safetensors.torch.load_file(path)
        tensors[f"q.{side}.values"][rows] *= 1.01
        safetensors.torch.save_file(tensors, path)
        edit_json(world.path, CONFIG_FILE, lambda c: c["basis"][0].update(digest_of(path)))
        return validate(world.path)

    (problem,) = scale(slice(4, 5), "U")
    assert "basis U of module q, rows 4:12, is not orthonormal" in problem
    (problem,) = scale(slice(0, 1), "V")
    assert "basis V of module q, rows 0:6, is not orthonormal" in problem
    # Rows that no task uses any more, as after a removal, may be of several clusters.
    write_world(world.path)
    kept = [task for task, r in world.tasks.items() if not any(s.is_joint for s in r.segments)]
    joint = [task for task in world.tasks if task not in kept]
    assert kept
    assert joint
    remove_tasks(world.path, joint)
    assert validate(world.path) == []
    # A task on all rows needs all of them to be orthonormal.
    write_world(world.path)
    edit_json(
        world.path,
        TASKS_FILE,
        lambda t: [s.update(rows=[0, 12, 0, 10]) for s in t["rows"]["segments"] if not s["module"]],
    )
    found = validate(world.path)
    assert sum("of module q is not orthonormal" in line for line in found) == 2


# --- what it decodes to --------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["float32", "nf4-dq"])
def test_tasks_decode_to_what_the_page_says(tmp_path: Path, basis: str) -> None:
    write_world(tmp_path / "ckpt", basis=basis)
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    bases = bases_of(checkpoint)
    for task_id in checkpoint.tasks:
        for name, stored in checkpoint.load_task(task_id).modules.items():
            a, b = decode(stored, bases.get((name, stored.representation)))
            assert a.shape == (stored.rank, MODULES[name][0])
            want = delta_by_hand(stored, bases, name)
            torch.testing.assert_close((b.double() @ a.double()), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", SHARED_FORMATS)
@pytest.mark.parametrize("rank", [1, 6])
def test_cores_of_every_format_on_some_rows_keep_what_they_can(format: str, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    u = torch.linalg.qr(torch.randn(70, 20, generator=generator))[0].T.contiguous()
    v = torch.linalg.qr(torch.randn(90, 20, generator=generator))[0].T.contiguous()
    basis = Basis(pack(u, "float32"), pack(v, "float32"))
    a = torch.randn(rank, 9, generator=generator) @ v[3:12]
    b = u[5:13].T @ torch.randn(8, rank, generator=generator)
    stored = encode_joint(a, b, 2.0, u[5:13], v[3:12], format, (5, 13, 3, 12))
    assert stored.core == ("factors" if rank == 1 else "dense")
    lost, all_of_it = relative_error(a, b, 2.0, stored, basis)
    allowed = {"float32": 1e-12, "float16": 1e-6, "bfloat16": 1e-4, "int8": 1e-3}
    assert lost <= allowed.get(format, 0.03) * all_of_it


# --- slots ---------------------------------------------------------------------------------------


def test_slots_hold_what_tasks_decode_to(world: Checkpoint) -> None:
    _check_slots(world)


@pytest.mark.parametrize("basis", ["bfloat16", "int8", "nf4", "nf4-dq"])
def test_slots_hold_what_tasks_decode_to_from_a_packed_basis(tmp_path: Path, basis: str) -> None:
    write_world(tmp_path / "ckpt", basis=basis)
    _check_slots(Checkpoint.open(tmp_path / "ckpt"))


def _check_slots(checkpoint: Checkpoint) -> None:
    rank = 8
    a_slots = {n: torch.full((2, rank, d_in), torch.nan) for n, (d_in, _) in MODULES.items()}
    b_slots = {n: torch.full((2, d_out, rank), torch.nan) for n, (_, d_out) in MODULES.items()}

    def layout(name: str) -> SliceLayout:
        d_in, d_out = MODULES[name]
        # The second half of the outputs stands before the first, as in a merged layer.
        runs = (Run(d_out // 2, 0, d_out - d_out // 2), Run(0, d_out - d_out // 2, d_out // 2))
        return SliceLayout(
            name, lambda s: a_slots[name][s], lambda s: b_slots[name][s].T, d_in, d_out,
            (Run(0, 0, d_in),), runs,
        )  # fmt: skip

    writer = SlotWriter([layout(name) for name in MODULES], rank)
    store = ResidentStore(CPU, str, lambda ck, ids, direct: writer.check(ck, ids, engine_name=str))
    store.preload(checkpoint.path)
    for task_id in checkpoint.tasks:
        writer.write(1, store.task(task_path(checkpoint, task_id)))
        wanted = decoded(checkpoint, task_id)
        for name, (_, d_out) in MODULES.items():
            got_a = a_slots[name][1]
            second = d_out - d_out // 2
            got_b = torch.cat([b_slots[name][1][second:], b_slots[name][1][:second]])
            if name not in wanted:
                assert not got_a.any()
                assert not got_b.any()
                continue
            a, b = wanted[name]
            torch.testing.assert_close(got_a[: len(a)], a, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got_b[:, : len(a)], b, rtol=1e-5, atol=1e-5)
            assert not got_a[len(a) :].any()
            assert not got_b[:, len(a) :].any()


# --- direct --------------------------------------------------------------------------------------


def layouts(rank: int = 0, ranks: int = 1) -> list[LayerLayout]:
    """q, k and v column-parallel, each a layer, and o row-parallel, on one tensor-parallel rank."""

    def nothing(slot: int) -> torch.Tensor:
        raise AssertionError("a direct task looked at a slot")

    def layer(name: str) -> LayerLayout:
        whole = [Run(0, 0, width) for width in MODULES[name]]
        cut = 0 if name == "o" else 1
        width = MODULES[name][cut] // ranks
        whole[cut] = Run(width * rank, 0, width)
        part = SliceLayout(name, nothing, nothing, *MODULES[name], (whole[0],), (whole[1],))
        return LayerLayout(name, (part,))

    return [layer(name) for name in MODULES]


def direct_path(
    checkpoint: Checkpoint, rank: int = 0, ranks: int = 1, **options: Any
) -> DirectPath:
    arguments = {"slots": 12, "max_tokens": 64, "device": CPU, "dtype": torch.float32, **options}
    return DirectPath(checkpoint, layouts(rank, ranks), str, **arguments)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("basis", "packed"), [("float32", False), ("nf4-dq", False), ("nf4", True)]
)
def test_direct_layers_add_what_tasks_decode_to(
    tmp_path: Path, ranks: int, basis: str, packed: bool
) -> None:
    write_world(tmp_path / "ckpt", basis=basis)
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    paths = [direct_path(checkpoint, rank, ranks, packed_basis=packed) for rank in range(ranks)]
    tasks = [t for t in checkpoint.tasks if paths[0].obstacle(checkpoint, t) is None]
    assert tasks == [t for t in checkpoint.tasks if t != "flat"]
    numbers = np.array([*range(len(tasks) + 1), *range(len(tasks) + 1)])
    for path in paths:
        slots = DirectSlots(path)
        for number, task_id in enumerate(tasks, 1):
            slots.activate(number, path.make_task(checkpoint.load_task(task_id)))
        slots.route(numbers)
    generator = torch.Generator().manual_seed(7)
    bases = bases_of(checkpoint)
    for name, (d_in, d_out) in MODULES.items():
        x = torch.randn(len(numbers), d_in, generator=generator)
        pieces = []
        for rank, path in enumerate(paths):
            layer = path.layers[name]
            columns = slice(rank * layer.d_in, (rank + 1) * layer.d_in)
            y = torch.zeros(len(numbers), layer.width)
            part = x[:, columns].contiguous() if name == "o" else x
            add_direct(y, part, layer, path.table, path.routing)
            pieces.append(y)
        got = sum(pieces) if name == "o" else torch.cat(pieces, dim=1)
        want = torch.zeros(len(numbers), d_out, dtype=torch.float64)
        for number, task_id in enumerate(tasks, 1):
            stored = checkpoint.load_task(task_id).modules.get(name)
            if stored is not None:
                rows = torch.from_numpy(numbers == number)
                want[rows] = x[rows].double() @ delta_by_hand(stored, bases, name).T
                assert want[rows].abs().amax() > 0.1
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=3e-5)


def test_flat_tasks_are_materialized_beside_direct_ones(world: Checkpoint) -> None:
    store = ResidentStore(CPU, str, lambda *_: None)
    store.preload(world.path, lambda checkpoint: direct_path(checkpoint))
    held = {task.task_id: task for task in store.tasks()}
    assert held["flat"].obstacle == "module v is stored flat"
    assert [task_id for task_id, task in held.items() if task.direct is None] == ["flat"]


# --- memory --------------------------------------------------------------------------------------


def test_memory_to_materialize_is_what_the_store_holds(world: Checkpoint) -> None:
    store = ResidentStore(CPU, str, lambda *_: None)
    store.preload(world.path)
    found = plan_memory(world, max_loras=1).mode("materialize")
    lefts = sum(
        source.left.nbytes
        for task in store.tasks()
        for pair in task.sources.values()
        for source in pair
        if source.left is not None
    )
    assert found.cores_nbytes == lefts
    private = [
        (world.modules[s.module], s)
        for record in world.tasks.values()
        for s in record.segments
        if s.representation == "private"
    ]
    # Narrow rows are four bits wide in memory.
    assert found.factors_nbytes == sum(
        s.rank * sum(row_nbytes(s.format, width) for width in (m.d_in, m.d_out)) for m, s in private
    )
    shared = [basis for _, _, basis in world.shared()]
    assert found.bases_nbytes == sum(b.u.nbytes + b.v.nbytes for b in shared)


@pytest.mark.parametrize("basis", ["bfloat16", "nf4"])
def test_memory_to_run_direct_is_what_the_path_holds(tmp_path: Path, basis: str) -> None:
    write_world(tmp_path / "ckpt", basis=basis)
    checkpoint = Checkpoint.open(tmp_path / "ckpt")
    path = direct_path(checkpoint, dtype=torch.bfloat16)
    for task_id in checkpoint.tasks:
        if path.obstacle(checkpoint, task_id) is None:
            path.make_task(checkpoint.load_task(task_id))
    found, real = plan_memory(checkpoint, max_loras=12).mode("auto"), path.memory()
    flat = checkpoint.record("flat").segments
    assert found.materialized_tasks == 1
    # The flat task is held as sources, its bases beside those of the direct tasks.
    rank = {0: FLAT["q"], 2: FLAT["v"]}
    lefts = 4 * (sum(rank[s.module] ** 2 * (K_IN + K_OUT + 2) for s in flat[:2]) + 2 * (7 + 3))
    assert found.cores_nbytes == real.cores + lefts
    assert found.factors_nbytes == real.factors
    packed = sum(
        matrix.nbytes
        for name, kind, shared in checkpoint.shared()
        for matrix in (shared.u, shared.v)
        if kind == "flat" or name == "o"
    )
    assert found.bases_nbytes == real.bases + packed


# --- export --------------------------------------------------------------------------------------


def test_exported_folders_hold_what_is_stored(world: Checkpoint, tmp_path: Path) -> None:
    folders = export_all(world, world.tasks, tmp_path / "out", dtype=torch.float32)
    for task_id, folder in folders.items():
        assert folder.name == encode_task_id(task_id)
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
        wanted = decoded(world, task_id)
        assert len(tensors) == 2 * len(wanted)
        for name, (a, b) in wanted.items():
            rank = config["rank_pattern"].get(name, config["r"])
            scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / rank
            got_a, got_b = (
                next(t for key, t in tensors.items() if f".{name}.lora_{side}." in key)
                for side in "AB"
            )
            assert got_a.shape == a.shape
            torch.testing.assert_close(scale * got_b @ got_a, b @ a, rtol=1e-4, atol=1e-5)


def test_clusters_are_what_the_world_has() -> None:
    """The ranges of q cover its basis, or the tests of orthonormality would prove little."""
    assert [r[:2] for r in CLUSTERS] == [(0, 4), (4, WIDTHS["q"][0])]
    assert [r[2:] for r in CLUSTERS] == [(0, 6), (6, WIDTHS["q"][1])]

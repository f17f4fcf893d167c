"""A blend in memory is the weighted sum of its tasks, whatever they are stored as."""

from __future__ import annotations

import itertools
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from format2_world import write_world
from plugin_world import TASKS, build, make_path

from vllm_vlora.blend_names import Blend, Term
from vllm_vlora.blending.blended import BlendedCheckpoint, _times, with_named_blends
from vllm_vlora.checkpoint import manifest
from vllm_vlora.checkpoint.reader import Checkpoint
from vllm_vlora.checkpoint.task_index import IndexedTasks
from vllm_vlora.checkpoint.writer import CheckpointWriter
from vllm_vlora.editing.aliasing import set_alias
from vllm_vlora.errors import BlendError, TaskNotFoundError
from vllm_vlora.narrow_rows import NarrowMatrix
from vllm_vlora.quantize import FLOAT_DTYPES, FORMATS, pack, unpack
from vllm_vlora.representations.decode import decode
from vllm_vlora.representations.private import encode_private
from vllm_vlora.representations.registry import segment_fault, segment_sides

WEIGHTS = [Decimal(text) for text in ("0.7", "-0.3", "1.5", "0.001")]


def blend_of(*tasks: str) -> Blend:
    return tuple(Term(task, WEIGHTS[place]) for place, task in enumerate(tasks))


def blended(source: Checkpoint, blend: Blend) -> BlendedCheckpoint:
    return BlendedCheckpoint(source, blend, "tasks/blend.safetensors", "0" * 32)


def updates(
    checkpoint: Checkpoint, task: str, *, narrow: bool = False
) -> dict[str, tuple[torch.Tensor, str]]:
    """delta_W of each module in float64, and what it is stored as."""
    stored = checkpoint.load_task(task, narrow=narrow)
    shared = {(name, kind): basis for name, kind, basis in checkpoint.shared()}
    found = {}
    for name, module in stored.modules.items():
        a, b = decode(module, shared.get((name, module.representation)))
        found[name] = b.double() @ a.double(), f"{module.representation} {module.format}"
    return found


def errors(
    source: Checkpoint, blend: Blend, *, narrow: bool = False
) -> dict[str, tuple[float, str]]:
    """||blend - sum||_F / sum of ||terms||_F of each module, and what it is stored as."""
    made = updates(blended(source, blend), blended(source, blend).task_id, narrow=narrow)
    wanted: dict[str, torch.Tensor] = {}
    norms: dict[str, float] = {}
    for task, weight in blend:
        for name, (update, _) in updates(source, task).items():
            wanted[name] = wanted.get(name, 0) + float(weight) * update
            norms[name] = norms.get(name, 0.0) + float((float(weight) * update).norm())
    assert made.keys() == wanted.keys()
    return {
        name: (float((made[name][0] - wanted[name]).norm()) / norms[name], made[name][1])
        for name in wanted
    }


@pytest.mark.parametrize("basis", ["float32", "nf4"])
def test_every_representation(tmp_path: Path, basis: str) -> None:
    """All pairs and some triples of tasks that are joint on clusters, narrow, private and flat."""
    write_world(tmp_path / "ck", basis=basis)
    source = Checkpoint.open(tmp_path / "ck")
    tasks = list(source.tasks)
    kinds = set()
    for chosen in [*itertools.combinations(tasks, 2), *list(itertools.combinations(tasks, 3))[::7]]:
        for narrow in (False, True):
            found = errors(source, blend_of(*chosen), narrow=narrow)
            for name, (error, kind) in found.items():
                # Doubly quantised scales have steps of 16 bits; the rest is float32's rounding.
                bound = 2**-16 if kind.endswith("nf4-dq") else 4e-7
                assert error < bound, (chosen, name, kind, error)
                kinds.add(kind.replace("nf4-narrow", "nf4-dq"))
    assert {"joint float32", "private nf4-dq", "private float32"} <= kinds


@pytest.mark.parametrize("format", FORMATS)
def test_every_number_format(tmp_path: Path, format: str) -> None:
    source = build(tmp_path / "ck", private=format)
    found = errors(source, blend_of("private", "mixed", "one"))
    kept = "float32" if format in FLOAT_DTYPES else format
    assert {name: kind for name, (_, kind) in found.items()} == {
        # Joint in one of the tasks and private in others.
        "q": "private float32",
        "o": "private float32",
        "v": f"private {kept}",
        "k": f"private {format}",
    }
    for name, (error, _) in found.items():
        assert error < (2**-16 if format == "nf4-dq" else 3e-7), name


def test_formats_of_one_family_meet_in_it(tmp_path: Path) -> None:
    """nf4 holds all of nf4-dq; nothing but floats holds int8 and nf4."""
    generator = torch.Generator().manual_seed(0)
    (tmp_path / "ck").mkdir()
    writer = CheckpointWriter(tmp_path / "ck", None)
    writer.add_module("q", 80, 256)
    for task in ("nf4", "nf4-dq", "int8", "bfloat16"):
        a, b = torch.randn(2, 80, generator=generator), torch.randn(256, 2, generator=generator)
        stored = encode_private(a, b, 1.5, task)
        writer.add_task(task, {"q": stored}, original_nbytes=1, error=0.0, adapter_config={})
    writer.finish("card")
    source = Checkpoint.open(tmp_path / "ck")
    for tasks, format in (
        (("nf4", "nf4-dq"), "nf4"),
        (("nf4", "int8"), "float32"),
        (("bfloat16", "nf4-dq"), "float32"),
    ):
        error, kind = errors(source, blend_of(*tasks))["q"]
        assert (kind, error < 3e-7) == (f"private {format}", True)


def test_joint_tasks_are_blended_in_core_space(tmp_path: Path) -> None:
    """No module becomes private, and a core takes no more than a dense one."""
    source = build(tmp_path / "ck")
    made = blended(source, blend_of("joint", "mixed"))
    for name, module in made.load_task(made.task_id).modules.items():
        if name in ("q", "o"):
            k_out, k_in = {"q": (6, 5), "o": (7, 7)}[name]
            assert module.is_joint
            assert sum(m.rows * m.cols for m in module.matrices.values()) <= k_out * k_in
    assert all(error < 3e-7 for error, _ in errors(source, blend_of("joint", "mixed")).values())


def test_what_the_record_says_is_what_is_loaded(tmp_path: Path) -> None:
    write_world(tmp_path / "ck")
    source = Checkpoint.open(tmp_path / "ck")
    for chosen in itertools.combinations(source.tasks, 2):
        made = blended(source, blend_of(*chosen))
        record = made.record(made.task_id)
        stored = made.load_task(made.task_id)
        assert record.max_rank == max(module.rank for module in stored.modules.values())
        for segment in record.segments:
            spec = made.modules[segment.module]
            module = stored.modules[spec.name]
            assert segment_fault(segment, spec) is None
            assert (segment.representation, segment.format, segment.rank, segment.core) == (
                module.representation, module.format, module.rank, module.core,
            )  # fmt: skip
            shapes = {side: (m.rows, m.cols) for side, m in module.matrices.items()}
            assert shapes == segment_sides(segment, spec)
            assert segment.rows == module.rows


def test_a_blend_keeps_no_file_of_a_task_in_memory(tmp_path: Path) -> None:
    """A module that one task alone has would be a view of all of that task's tensors."""
    source = build(tmp_path / "ck")
    made = blended(source, blend_of("private", "one"))
    for module in made.load_task(made.task_id).modules.values():
        for matrix in module.matrices.values():
            for part in matrix.parts.values():
                assert part.untyped_storage().nbytes() == part.nbytes


def test_narrow_rows_stay_narrow(tmp_path: Path) -> None:
    source = build(tmp_path / "ck", private="narrow")
    made = blended(source, blend_of("private", "one"))
    stored = made.load_task(made.task_id, narrow=True)
    both = stored.modules["o"].matrices["B"]
    assert isinstance(both, NarrowMatrix)
    # Rows of 4, 3 and 2 bits: (1, 2, 2) of rank 5 and (0, 1, 1) of rank 2.
    assert both.bits == (1, 3, 3)


def test_a_zero_row_stays_zero() -> None:
    values = torch.zeros(2, 130)
    values[0, 3] = 1.0
    for format in ("float32", "int8", "nf4", "nf4-dq"):
        packed = pack(values, format)
        scaled = unpack(_times(packed, -0.3))
        assert float(scaled[0, 3]) == pytest.approx(-0.3 * float(unpack(packed)[0, 3]), rel=2**-16)
        assert not scaled[1].any()


def test_what_is_refused(tmp_path: Path) -> None:
    extra = {"one": {"base_model.model.score.weight": torch.zeros(2, 3)}}
    source = build(tmp_path / "ck", extra=extra)
    with pytest.raises(BlendError, match=r"'one' carries base_model\.model\.score\.weight"):
        blended(source, blend_of("private", "one"))
    with pytest.raises(TaskNotFoundError, match="no task 'other'"):
        blended(source, blend_of("private", "other"))


def test_an_alias_names_no_blend_that_cannot_be(tmp_path: Path) -> None:
    extra = {"one": {"base_model.model.score.weight": torch.zeros(2, 3)}}
    source = build(tmp_path / "ck", extra=extra)
    with pytest.raises(BlendError, match="carries base_model"):
        set_alias(source.path, "both", "private 9, private+one 1")
    # A task alone has its head.
    set_alias(source.path, "head", "one")
    assert with_named_blends(Checkpoint.open(source.path)).tasks.keys() == source.tasks.keys()
    set_alias(source.path, "mix", "private*0.5+mixed")
    assert with_named_blends(Checkpoint.open(source.path)).tasks.keys() == {
        *source.tasks,
        "mixed+private*0.5",
    }


def test_beside_named_blends_the_records_of_an_index_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ("private", "mixed", "one")
    tasks = {f"{kind} {n}": TASKS[kind] for n in range(30) for kind in kinds}
    paths = []
    for number, most in enumerate((1000, 1)):
        monkeypatch.setattr(manifest, "INDEXED_TASKS", most)
        source = build(tmp_path / f"ck{number}", tasks)
        set_alias(source.path, "mix", "private 3*0.5+one 4")
        read: list[str] = []
        original = IndexedTasks._read_record
        with monkeypatch.context() as patch:
            patch.setattr(
                IndexedTasks,
                "_read_record",
                lambda self, task, read=read, original=original: (
                    read.append(task) or original(self, task)
                ),
            )
            opened = with_named_blends(Checkpoint.open(source.path))
            paths.append(make_path(opened))
            assert {name: opened.entry(name).max_rank for name in tasks} == {
                name: source.entry(name).max_rank for name in tasks
            }
            assert opened.entry("one 4+private 3*0.5").max_rank == 7
        assert set(read) <= {"one 4", "private 3"}
    in_json, indexed = paths
    for task in tasks:
        assert in_json.obstacle(source, task) == indexed.obstacle(source, task)


def test_a_copy_of_a_base_weight_is_no_obstacle(tmp_path: Path) -> None:
    extra = {"one": {"base_model.model.embed_tokens.base_layer.weight": torch.zeros(2, 3)}}
    source = build(tmp_path / "ck", extra=extra)
    made = blended(source, blend_of("private", "one"))
    assert not made.load_task(made.task_id).extra

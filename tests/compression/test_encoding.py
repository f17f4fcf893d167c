"""What is encoded together is what each would be alone, and its error that of the dense product."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from synthetic import check, family, run

from vllm_vlora.adapters.collection import Collection
from vllm_vlora.compression import encoding
from vllm_vlora.compression.encoding import encode_alike
from vllm_vlora.compression.options import CompressOptions
from vllm_vlora.compression.pipeline import Compression
from vllm_vlora.errors import AdapterError
from vllm_vlora.fitting.whitening import FROBENIUS, Metric, Whitener
from vllm_vlora.planning import survey
from vllm_vlora.planning.private_curves import PrivateOption
from vllm_vlora.representations.decode import decode


def _whitened() -> Metric:
    return Metric(Whitener.from_moment(torch.diag(torch.logspace(0, -2, 70))), None)


@pytest.mark.parametrize("metric", [FROBENIUS, _whitened()])
@pytest.mark.parametrize(
    "option",
    [
        PrivateOption("nf4", 4, True, 0, 1.0),
        PrivateOption("float32", 4, True, 0, 0.0),
        PrivateOption("float32", 4, False, 0, 1.0),
        PrivateOption("int8", 2, False, 0, 1.0),
        PrivateOption("nf4-dq", 4, False, 0, 1.0, (2, 1, 1)),
        PrivateOption("nf4-dq", 2, False, 0, 1.0, (0, 0, 2)),
    ],
)
def test_updates_encoded_together(option: PrivateOption, metric: Metric) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(4, 70, generator=generator), torch.randn(90, 4, generator=generator), scale)
        for scale in (0.5, 2.0, -1.0)
    ]
    for (a, b, scale), (stored, loss) in zip(
        factors, encode_alike(factors, [option] * len(factors), metric)
    ):
        ((alone, _),) = encode_alike([(a, b, scale)], [option], metric)
        for side, matrix in stored.matrices.items():
            for part, values in matrix.parts.items():
                assert torch.equal(values, alone.matrices[side].parts[part])
        assert (stored.bits, stored.rank) == (option.bits, option.rank)
        new_a, new_b = decode(stored, None)
        delta = scale * b.double() @ a.double()
        difference = new_b.double() @ new_a.double() - delta
        lost = float(difference.square().sum() / delta.square().sum())
        assert stored.error**2 == pytest.approx(lost, rel=1e-6, abs=1e-12)
        seen = float(metric.a(difference).square().sum())
        assert loss.seen_lost == pytest.approx(seen, rel=1e-6, abs=1e-7)
        assert loss.seen_norm == pytest.approx(float(metric.a(delta).square().sum()), rel=1e-9)


def test_many_tasks_are_not_decomposed_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters = family(tmp_path / "in", 24, related=False)
    batches: Counter[int] = Counter()
    whole = encoding.leading_factors

    def counted(a: torch.Tensor, *rest: object) -> object:
        batches[len(a)] += 1
        return whole(a, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(encoding, "leading_factors", counted)
    report = run(adapters, tmp_path / "together", representation="private", quantize="int8")
    check(tmp_path / "together", adapters, report)
    together, updates = batches.total(), sum(size * count for size, count in batches.items())
    assert 4 * together < updates
    monkeypatch.setattr(survey, "_BATCH_ELEMENTS", 1)
    batches.clear()
    run(adapters, tmp_path / "apart", representation="private", quantize="int8")
    assert batches == {1: updates}
    for path in (tmp_path / "together" / "tasks").iterdir():
        assert path.read_bytes() == (tmp_path / "apart" / "tasks" / path.name).read_bytes()


def test_what_became_too_large_meanwhile_is_named(tmp_path: Path) -> None:
    adapters = family(tmp_path / "in", 3, related=False, dtype=torch.float32)
    options = CompressOptions("private", quantize="none", dtype="float16", ratio=1.5)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").mkdir()
    with Compression(Collection(adapters), options, tmp_path / "scratch") as compression:
        chosen = compression.choose()
        task, adapter = list(adapters.items())[1]
        module = list(adapter.modules)[-1]
        tensors = load_file(adapter.path / "adapter_model.safetensors")
        tensors[f"base_model.model.{module}.lora_A.weight"] *= 1e30
        save_file(tensors, adapter.path / "adapter_model.safetensors")
        with pytest.raises(AdapterError, match=f"task '{task}', module {module}: .*too large"):
            compression.write(tmp_path / "out", chosen)

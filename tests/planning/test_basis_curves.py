"""What a survey says of a fitted basis in every format, against projections in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from synthetic import family

from vllm_vlora.adapters.collection import Collection
from vllm_vlora.planning.number_formats import Formats
from vllm_vlora.planning.survey import SurveyJob, Surveyor, SurveySettings
from vllm_vlora.quantize import pack, unpack
from vllm_vlora.representations.factors import squared_norm

NAME = "model.layers.0.q_proj"
FORMATS = ("float32", "bfloat16", "int8", "nf4-dq")


def projected(rows: torch.Tensor, format: str) -> torch.Tensor:
    """The projection on what these rows span once they are packed, (d, d) float64."""
    q = torch.linalg.qr(unpack(pack(rows, format)).double().T)[0]
    return q @ q.T


@pytest.mark.parametrize("related", [True, False])
def test_every_format_and_width_loses_what_its_projection_does(
    tmp_path: Path, related: bool
) -> None:
    shapes = {NAME: (256, 192)}
    collection = Collection(family(tmp_path, 12, related=related, shapes=shapes))
    settings = SurveySettings(Formats(FORMATS, None), byte_limit=collection.original_nbytes)
    tasks = tuple(range(12))
    found = Surveyor(collection, settings)(SurveyJob(NAME, False, ((0, tasks),)))
    u_t, v = found.bases[0]
    dense = [
        scale * b.double() @ a.double()
        for a, b, scale in collection.read_module(collection.modules[NAME])
    ]
    norms = torch.stack([delta.square().sum() for delta in dense])
    for format, curve in found.joint[0].curves.items():
        for place in (0, len(curve.bases) // 2, -1):
            basis = curve.bases[place]
            left, right = projected(u_t[: basis.k_out], format), projected(v[: basis.k_in], format)
            lost = torch.stack([(x - left @ x @ right).square().sum() for x in dense]) / norms
            said = curve.losses("float32", collection.modules[NAME].ranks, False)[:, place] / norms
            torch.testing.assert_close(said, lost, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("related", [True, False])
def test_of_long_rows_every_format_loses_what_its_projection_does_but_for_chance(
    tmp_path: Path, related: bool
) -> None:
    """Rows whose rounding is only expected, a quarter as many as they are long."""
    shapes = {NAME: (1024, 1280)}
    collection = Collection(family(tmp_path, 60, related=related, shapes=shapes))
    settings = SurveySettings(Formats(FORMATS, None), byte_limit=8 * collection.original_nbytes)
    found = Surveyor(collection, settings)(SurveyJob(NAME, False, ((0, tuple(range(60))),)))
    u_t, v = found.bases[0]
    assert u_t.shape == (270, 1280)
    factors = list(collection.read_module(collection.modules[NAME]))
    norms = torch.tensor([squared_norm(*f) for f in factors], dtype=torch.float64)
    for format, curve in found.joint[0].curves.items():
        for place in (len(curve.bases) // 2, -1):
            basis = curve.bases[place]
            left = torch.linalg.qr(unpack(pack(u_t[: basis.k_out], format)).double().T)[0]
            right = torch.linalg.qr(unpack(pack(v[: basis.k_in], format)).double().T)[0]
            cores = [
                scale * (left.T @ b.double()) @ (a.double() @ right) for a, b, scale in factors
            ]
            lost = 1 - torch.stack([core.square().sum() for core in cores]) / norms
            said = curve.losses("float32", collection.modules[NAME].ranks, False)[:, place] / norms
            torch.testing.assert_close(said, lost, rtol=0.1, atol=2e-5)
            torch.testing.assert_close(said.mean(), lost.mean(), rtol=0.015, atol=5e-6)


def test_norms_are_those_of_the_updates(tmp_path: Path) -> None:
    collection = Collection(family(tmp_path, 4, related=False))
    settings = SurveySettings(Formats(FORMATS, None), byte_limit=collection.original_nbytes)
    for private in (True, False):
        found = Surveyor(collection, settings)(SurveyJob(NAME, private, ((0, (0, 1, 2, 3)),)))
        for task, factors in enumerate(collection.read_module(collection.modules[NAME])):
            assert found.norms[task] == pytest.approx(squared_norm(*factors), rel=1e-9)

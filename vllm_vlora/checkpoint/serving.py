"""How a checkpoint is served with vLLM: the command line, and the tasks that vLLM cannot serve.

What is said offline (``info``, ``compress``, ``plan``, ``serve``) and what the plugin refuses when an
engine starts is one rule, which stands here and in ``plugin.memory``; nothing here needs vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from vllm_vlora.adapters.saved_tensors import is_base_copy
from vllm_vlora.wording import quoted

if TYPE_CHECKING:
    from vllm_vlora.checkpoint.manifest import TaskRecord

CHECKPOINT_VARIABLE = "VLLM_VLORA_CHECKPOINT"
VLLM_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts for ``--max-lora-rank`` (``vllm.config.lora.MaxLoRARanks``)."""
MATERIALIZED_LORAS = 8
"""``--max-loras`` where every task is materialized: each is a slot of memory, of every layer."""
# A task that runs direct takes no slot, only a record of some kB. More than this many requests vLLM does
# not run at once, unless --max-num-seqs says so.
_DIRECT_LORAS = 256
# ``modules_to_save`` that vLLM's classification models take (``supported_modules_to_save``, 0.32).
_SERVED_HEADS = ("score", "classifier")


def serving_rank(rank: int) -> int | None:
    """The smallest ``--max-lora-rank`` of vLLM's that holds ``rank``; None above 512."""
    return next((allowed for allowed in VLLM_LORA_RANKS if allowed >= rank), None)


def max_loras(tasks: int, *, materialize: bool = False) -> int:
    """The ``--max-loras`` to start vLLM with for this many tasks: how many of them one batch may have.

    Args:
        materialize: every task takes one of so many slots (``VLLM_VLORA_MODE=materialize``).
    """
    return max(1, min(tasks, MATERIALIZED_LORAS if materialize else _DIRECT_LORAS))


def serve_options(max_rank: int, tasks: int, *, materialize: bool = False) -> dict[str, str | None]:
    """Option of ``vllm serve`` -> its value, None for a flag, to serve so many tasks of such ranks.

    Tasks of a rank above vLLM's largest run direct or not at all, and take no slot.
    """
    return {
        "--enable-lora": None,
        "--max-lora-rank": str(serving_rank(max_rank) or VLLM_LORA_RANKS[-1]),
        "--max-loras": str(max_loras(tasks, materialize=materialize)),
    }


def serve_command(checkpoint: str, base_model: str | None, max_rank: int, tasks: int) -> str:
    """The shell line that serves every task of a checkpoint from vLLM, ready to paste.

    Args:
        checkpoint: folder or Hub id. base_model: None, or a name that vLLM would take for an option,
        leaves a placeholder. max_rank: the largest rank of any task. tasks: how many there are.
    """
    model = base_model if base_model is not None and is_model_name(base_model) else "BASE_MODEL"
    options = [
        word
        for name, value in serve_options(max_rank, tasks).items()
        for word in (name, value)
        if word is not None
    ]
    return shell_line(checkpoint, ["vllm", "serve", model, *options])


def shell_line(checkpoint: str, command: Sequence[str]) -> str:
    """A command with the plugin's variable before it, quoted for the shell."""
    return f"{CHECKPOINT_VARIABLE}={quoted([checkpoint])} {quoted(command)}"


def remove_line(checkpoint: str, tasks: Iterable[str]) -> str:
    """The shell line that writes a copy without some tasks; none of them becomes an option of it."""
    names = list(tasks)
    if any(name.startswith("-") for name in names):
        return f"vllm-vlora remove {quoted([checkpoint])} -o COPY -- {quoted(names)}"
    return f"vllm-vlora remove {quoted([checkpoint, *names])} -o COPY"


def is_model_name(base_model: str) -> bool:
    """Whether a recorded base model is a name, and nothing that vLLM would read as an option."""
    return base_model.strip() != "" and not base_model.startswith("-") and base_model.isprintable()


# --- what vLLM cannot serve -----------------------------------------------------------------------


def carried_tensors(record: TaskRecord) -> list[str]:
    """A task's tensors beside its LoRA weights that change the model: heads and other whole modules."""
    return [name for name in record.extra if not is_base_copy(name)]


def extra_obstacle(record: TaskRecord) -> str | None:
    """Why no vLLM serves the tensors that a task carries beside its LoRA weights; None where it may.

    Whether the served model has such a head, the plugin finds when it starts.
    """
    for name in carried_tensors(record):
        if name.split(".")[-2:-1] not in ([head] for head in _SERVED_HEADS):
            return (
                f"it carries {name}; of whole modules (modules_to_save) vLLM serves classification heads "
                f"alone ({', '.join(_SERVED_HEADS)})"
            )
    return None

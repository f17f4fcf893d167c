"""How the user set the plugin up: environment variables, read once and checked."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_vlora.errors import SettingError

MODES = ("auto", "direct", "materialize")


# Slots for ordinary adapters and materialized tasks beside the direct ones. A slot of rank 16 takes
# 80 MB for a Llama-7B in 16 bits, so that one for each of a thousand tasks would fill a GPU.
DEFAULT_PEFT_SLOTS = 8
MODE_VARIABLE = "VLLM_VLORA_MODE"
SLOTS_VARIABLE = "VLLM_VLORA_SLOTS"
BASIS_VARIABLE = "VLLM_VLORA_BASIS"
BASES = ("dense", "packed")


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    Attributes:
        mode: ``auto`` runs a task direct where it can and materializes it otherwise, ``direct``
            refuses tasks that cannot run direct, ``materialize`` writes every task into a slot.
        slots: slots for adapters that need one, when tasks run direct; ``--max-loras`` caps it.
        packed_basis: keep quantised bases packed on the device instead of in the compute dtype.
    """

    mode: str = "auto"
    slots: int = DEFAULT_PEFT_SLOTS
    packed_basis: bool = False

    @property
    def direct(self) -> bool:
        """Whether tasks may run direct."""
        return self.mode != "materialize"


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process; raises SettingError that names the variable and its values."""
    return Settings(
        mode=_choice(environment, MODE_VARIABLE, MODES),
        slots=_positive(environment, SLOTS_VARIABLE, DEFAULT_PEFT_SLOTS),
        packed_basis=_choice(environment, BASIS_VARIABLE, BASES) == "packed",
    )


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = environment.get(name) or choices[0]
    if value not in choices:
        raise SettingError(f"{name}={value!r}: use one of {', '.join(choices)}")
    return value


def _positive(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise SettingError(f"{name}={text!r}: use a whole number from 1 on")
    return int(text)

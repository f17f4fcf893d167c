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
LATE_VARIABLE = "VLLM_VLORA_LATE_MIB"
# For tasks that come after start-up. Taken from the KV cache, so it is kept small: on an 80 GB GPU 0.7 %
# of the memory. A hundred tasks of a 7B model at rank 16 in NF4 fit, or the packed bases of another
# checkpoint (80 MB at 64 components) and two hundred of its tasks; the least recently used give way.
DEFAULT_LATE_MIB = 512
BASES = ("dense", "packed")
BLENDS_VARIABLE = "VLLM_VLORA_BLENDS"
ROWS_VARIABLE = "VLLM_VLORA_ROWS"
ROWS = ("wide", "narrow")
OVERLAP_VARIABLE = "VLLM_VLORA_OVERLAP"
TEMPLATES_VARIABLE = "VLLM_VLORA_CHAT_TEMPLATES"
SWITCH = ("off", "on")


@dataclass(frozen=True)
class Settings:
    """The plugin's settings.

    Attributes:
        mode: ``auto`` runs a task direct where it can and materializes it otherwise, ``direct``
            refuses tasks that cannot run direct, ``materialize`` writes every task into a slot.
        slots: slots for adapters that need one, when tasks run direct; ``--max-loras`` caps it.
        packed_basis: keep quantised bases packed on the device instead of in the compute dtype.
        narrow_rows: hold private rows of 3 and 2 bits as they are stored instead of with 4.
        overlap: in CUDA graphs, run what a layer's direct tasks need of its input beside the base layer.
        chat_templates: render chats with the template that their task brought along.
        blends: take the name of a blend for one; those that aliases name are served either way.
        late_mib: MiB on each device for tasks that are loaded after start-up; 0 refuses them.
    """

    mode: str = "auto"
    slots: int = DEFAULT_PEFT_SLOTS
    packed_basis: bool = False
    late_mib: int = DEFAULT_LATE_MIB
    overlap: bool = False
    chat_templates: bool = False
    narrow_rows: bool = False
    blends: bool = True

    @property
    def direct(self) -> bool:
        """Whether tasks may run direct."""
        return self.mode != "materialize"


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings of this process; raises SettingError that names the variable and its values."""
    return Settings(
        mode=_choice(environment, MODE_VARIABLE, MODES),
        slots=_whole(environment, SLOTS_VARIABLE, DEFAULT_PEFT_SLOTS, least=1),
        packed_basis=_choice(environment, BASIS_VARIABLE, BASES) == "packed",
        late_mib=_whole(environment, LATE_VARIABLE, DEFAULT_LATE_MIB, least=0),
        overlap=_choice(environment, OVERLAP_VARIABLE, SWITCH) == "on",
        chat_templates=_choice(environment, TEMPLATES_VARIABLE, SWITCH) == "on",
        narrow_rows=_choice(environment, ROWS_VARIABLE, ROWS) == "narrow",
        blends=_choice(environment, BLENDS_VARIABLE, SWITCH[::-1]) == "on",
    )


def _choice(environment: Mapping[str, str], name: str, choices: tuple[str, ...]) -> str:
    value = environment.get(name) or choices[0]
    if value not in choices:
        raise SettingError(f"{name}={value!r}: use one of {', '.join(choices)}")
    return value


def _whole(environment: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise SettingError(f"{name}={text!r}: use a whole number from {least} on")
    return int(text)

"""What the plugin and the offline memory plan must agree on; imports nothing."""

MODES = ("auto", "direct", "materialize")
# Slots for ordinary adapters and materialized tasks beside the direct ones. A slot of rank 16 takes
# 80 MB for a Llama-7B in 16 bits, so that one for each of a thousand tasks would fill a GPU.
DEFAULT_PEFT_SLOTS = 8

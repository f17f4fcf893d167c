"""The benchmark of serving; imports run one way, in this order.

loads           which tasks are asked for, and with what prompts
figures         rates, latencies and ratios from what an engine's run recorded
report          from recorded runs to rows, tables and JSON; ``plot`` draws them
punica_runs     the fair CPU comparator: stock slots, one matrix product a run of equal adapters
worker          what a vLLM worker is asked to do beside serving: memory, profile, comparator
world           model, adapters, checkpoints and exports, written once into a folder
configurations  the engines that are compared
settings        the sizes of a run, from the command line and the device; what engines need in memory
engine          one engine in a process of its own, driven call by call
correctness     every configuration's tokens against stock vLLM's
program         the options and the run
"""

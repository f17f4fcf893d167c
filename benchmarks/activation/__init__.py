"""The benchmark of an activation: making a task ready that is not loaded; imports run one way.

ways     by the device alone: materialize, copies from the host, direct records
engine   by the LoRA manager of a real vLLM engine; ``startup`` times such an engine's start
program  the options and the run
"""

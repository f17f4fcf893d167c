"""The benchmark of an activation: making a task ready that is not loaded; imports run one way.

ways     by the device alone: materialize, copies from the host, direct records
startup  the start of a vLLM engine with the plugin and without it
engine   by the LoRA manager of a real vLLM engine
program  the options and the run
"""

"""The benchmark of the kernels; imports run one way, in this order.

punica      vLLM's own LoRA kernels: from an installed vLLM, or from a folder of their files
batches     the tokens of a batch, and which task each of them has
forward     the forward pass of one linear layer: base, punica, direct; enough copies to be cold
verify      each of them against float64 before it is timed
report      rows, tables, sums over a layer, the aims; ``plot`` draws
cells       all operations of one layer and batch, timed in turns
program     the options and the run, which also has ``activation.ways``: a whole task made ready

A folder named ``kernels`` would pass for Hugging Face's package of that name, which transformers uses.
"""

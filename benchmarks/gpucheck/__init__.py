"""What only a GPU can show of the direct kernels; imports run one way, in this order.

world       one layer with joint and private tasks of every format, and batches of them
smoke       results against the operation's definition, decode and prefill
replay      a graph captured with nothing routed, replayed with other tasks
profile     microseconds of every kernel, and of a layer with its direct work
sizes       the private kernels with other sizes than they choose
program     the options and the run
"""

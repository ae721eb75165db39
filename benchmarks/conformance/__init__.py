"""Every causal and encoder-decoder model type of transformers on ringattn's shards: exact, or refused with a reason.

tiny: a small configuration of any type; models: the model of it; batches: what it is given; double: fp64 throughout;
verdict: one case on the ranks against one process; ranks: all cases in one started job; report: the tables.
`benchmarks/conform.py` is the command.
"""

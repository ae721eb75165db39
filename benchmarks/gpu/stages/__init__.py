"""The stages of `run.py`, in the order they run, with the seconds each one gets of a ten minute run. No torch here.

Each module below has one function, `run(stage)`, which measures or checks something and notes it on the `Stage`.
"""

SHARES = {
    "environment": 15,
    "correctness": 90,
    "traps": 25,
    "baselines": 30,
    "efficiency": 130,
    "launches": 25,
    "merge": 25,
    "memory": 20,
    "graphs": 20,
    "compiled": 40,
    "symmetric": 50,
    "nccl": 100,
}

WHAT = {
    "environment": "versions of torch, cuDNN, NCCL, Triton and the driver; the card and its clocks",
    "correctness": "kernels x simulated ranks x schedules, both passes, against dense attention in fp64",
    "traps": "inputs that have broken attention kernels before",
    "baselines": "copy bandwidth, matrix products, dense attention by each of torch's kernels",
    "efficiency": "simulated ranks against dense attention over the whole sequence",
    "launches": "device operations per tile that are not attention, host time per tile",
    "merge": "merging of partial results, against the bandwidth of a copy",
    "memory": "peak memory of one rank, against what the plan says",
    "graphs": "CUDA graph capture and replay of forward and backward",
    "compiled": "torch.compile of the attention call",
    "symmetric": "several processes on one device, through memory they share",
    "nccl": "NCCL on one GPU, and what a rank says when its peer is killed (gloo on CPUs)",
}

"""Computes what tests/golden/ stores: a fixed set of schedules, plans, outputs, merges, topologies, and one small job.

`python tests/support/golden_cases.py` writes the files anew. Do that only when a change is meant to alter what is stored, and
say in the commit what changed and why; `git diff tests/golden` shows it line by line, as everything but the checkpoint is text.

Inputs are whole numbers divided by 64, drawn by torch's integer generator: they are the same bits on every machine, which
the normal distribution's are not.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from cases import simulate
from torch import Tensor, nn

from ringattn import (
    Plan,
    Schedule,
    Topology,
    attention,
    causal,
    documents,
    full,
    make_plan,
    prefix_lm,
    shard,
    sliding_window,
)
from ringattn import init as init_ranks
from ringattn.checkpoint import load, save
from ringattn.merging import bipartite as bipartite_merge
from ringattn.merging import delete, gather_rows, grid, segments, shorten, similar, windows
from ringattn.nn import DecoderConfig, Merging, MergingDecoder
from ringattn.planner import PRESETS, candidates
from ringattn.schedule import (
    accumulating_ring,
    bidirectional_ring,
    both_ways,
    divide,
    mesh,
    ring,
    side_by_side,
    split,
    take_turns,
    token_ring,
    ulysses,
)

HERE = Path(__file__).resolve().parent
STORED = HERE.parent / "golden"
WHOLE_TEXT_UP_TO = 3  # ranks: of larger schedules the digest and the first lines are stored
JOB_RANKS = 2
CONFIG = {"about": "golden"}  # of the stored checkpoint


# Schedules


def schedule_texts() -> dict[str, Any]:
    """The text form of every schedule that can be called by name, at several numbers of ranks and in its variants."""
    return {
        f"{name}, {world} ranks": _text(result) for world in (1, 2, 3, 4, 6, 8) for name, result in _schedules(world).items()
    }


def _schedules(world: int) -> dict[str, Schedule | tuple[Schedule, ...]]:
    inside = world // 2 if world % 2 == 0 else 1
    actual: dict[str, Schedule | tuple[Schedule, ...]] = {
        "ring": ring(world),
        "ring reversed": ring(world, direction=-1),
        "ring direct": ring(world, routing="direct", lookahead=2),
        "bidirectional_ring": bidirectional_ring(world),
        "token_ring": token_ring(world),
        "token_ring direct reversed": token_ring(world, routing="direct", direction=-1),
        "token_ring both ways": both_ways(token_ring(world)),
        "accumulating_ring": accumulating_ring(world),
        "mesh": mesh(world),
        "mesh direct": mesh(world, q_routing="direct", kv_routing="direct"),
        "mesh one row": mesh(world, a=world),
        "mesh divided": divide(mesh(world), q=2, kv=3),
        "ring split": split(ring(world), kv=2),
        "ring in turns": take_turns(ring(world, routing="direct"), kv=4),
        "rings side by side": side_by_side(ring(world), ring(world, direction=-1)),
        "ulysses": ulysses(ring(1), world),
        "ulysses in stages": ulysses(split(ring(1), q=2), world, stages=max(0, world - 1), groups=2),
    }
    if world > 1:
        actual["ulysses 2 with ring" if inside * 2 == world else "ulysses with one ring"] = ulysses(
            ring(inside), world // inside
        )
    return actual


def _text(result: Schedule | tuple[Schedule, ...]) -> Any:
    schedules = result if isinstance(result, tuple) else (result,)
    text = "\n\n".join(map(str, schedules))
    if schedules[0].world <= WHOLE_TEXT_UP_TO and len(text) < 1500:
        return text.splitlines()
    return {"sha256": sha256(text.encode()).hexdigest(), "lines": text.count("\n") + 1, "first": text.splitlines()[:3]}


# Plans

MODEL: dict[str, Any] = dict(world=4, heads=8, kv_heads=2, head_dim=16, dtype="bfloat16")
MASKS = {
    "full": full(),
    "causal": causal(),
    "window": sliding_window(9, 3),
    "documents": documents([0, 11, 12, 40, 101]),
    "prefix": prefix_lm(20),
    "documents and window": documents([0, 30, 101]) & sliding_window(12),
}
NAMES = ("ring", "bidirectional_ring", "ring_direct", "token_ring", "accumulating_ring", "mesh", "all_gather")


def plans() -> dict[str, Any]:
    """Digest and description of plans by name, and what "auto" chooses."""
    return {name: {"digest": plan.digest, "text": str(plan).splitlines()} for name, plan in _plans()}


def _plans() -> Iterable[tuple[str, Plan]]:
    for name in NAMES:
        yield f"{name}, causal", make_plan(101, **MODEL, schedule=name)
        yield f"{name}, full, 3 ranks", make_plan(50, **MODEL | {"world": 3}, schedule=name, mask=full())
    for name, mask in MASKS.items():
        yield f"ring, {name}", make_plan(101, **MODEL, schedule="ring", mask=mask)
    for layout in ("contiguous", "zigzag", "striped"):
        yield f"token_ring, {layout}", make_plan(101, **MODEL, schedule="token_ring", layout=layout)
    packed = dict(mask=MASKS["documents"], schedule="ring", layout="documents")
    yield "ring, documents layout", make_plan(101, **MODEL, **packed)
    for heads, kv_heads in ((8, 8), (6, 3), (8, 1)):
        yield (
            f"ulysses, {heads} over {kv_heads} heads",
            make_plan(101, **MODEL | dict(heads=heads, kv_heads=kv_heads), schedule="ring", ulysses=2),
        )
    for kernel in ("sdpa", "reference", "flash", "flex", "flash3:sm_margin=8", "emulated:50e9"):
        yield f"kernel {kernel}", make_plan(101, **MODEL, schedule="ring", kernel=kernel)
    for partials in ("wide", "narrow"):
        yield f"partials {partials}", make_plan(101, **MODEL, schedule="token_ring", partials=partials)
    yield "more keys than queries", make_plan(30, **MODEL, schedule="token_ring", kv_len=101, q_offset=71)
    yield "schedule as data", make_plan(101, **MODEL, schedule=split(token_ring(4), q=2))
    for topology in ("nvlink", "ethernet"):
        yield f"auto, {topology}", make_plan(4096, **MODEL | {"world": 2}, topology=topology)
    yield "auto for inference", make_plan(4096, **MODEL | {"world": 2}, training=False, mask=full(), topology="pcie")
    yield "balanced", make_plan(101, **MODEL | {"world": 2}, schedule="balanced", layout="contiguous")


def priced() -> dict[str, Any]:
    """Every candidate for one request, best first: digest, and predicted seconds of both passes.

    Prices are sums of IEEE doubles in one order, so they agree to the last digits everywhere.
    """
    actual = candidates(2048, **MODEL, topology="pcie", layout="zigzag")
    seconds = [[option.cost(backward=backward).seconds for backward in (False, True)] for option in actual]
    return {
        "best first": [f"{o.plan.digest} {a:.9e} {b:.9e}" for o, (a, b) in zip(actual[:12], seconds, strict=False)],
        "number": len(actual),
        "all": sha256("".join(sorted(option.plan.digest for option in actual)).encode()).hexdigest(),
    }


# Outputs and gradients

OUTPUTS: dict[str, dict[str, Any]] = {
    "ring, causal": dict(schedule="ring"),
    "token_ring, full": dict(schedule="token_ring", mask=full()),
    "mesh, documents": dict(schedule="mesh", mask=MASKS["documents"], layout="striped"),
    "ulysses, window": dict(schedule="ring", ulysses=2, mask=sliding_window(20, 5), layout="contiguous"),
    "ulysses alone, many heads": dict(schedule="ring", ulysses=4, kv_heads=8, mask=full()),
    "accumulating_ring, documents and window": dict(schedule="accumulating_ring", mask=MASKS["documents and window"]),
    "bidirectional_ring, reference kernel": dict(schedule="bidirectional_ring", kernel="reference"),
    "token_ring, narrow partials": dict(schedule="token_ring", partials="narrow", layout="zigzag"),
}
EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "key bias": {"key_bias": True},
    "sinks and softcap": {"sinks": True, "softcap": 3.0},
}
PARTS = ("out", "lse", "dq", "dk", "dv")


def outputs() -> dict[str, Any]:
    """Outputs and gradients on the simulated transport, all ranks in this process, in fp32 and bf16."""
    actual = {}
    for name, choices in OUTPUTS.items():
        for extra, options in EXTRAS.items():
            for dtype in (torch.float32, torch.bfloat16):
                tensors = _attended(choices, options, dtype)
                about = f"{name}, {extra}, {str(dtype).removeprefix('torch.')}"
                actual[about] = {part: summary(x) for part, x in tensors.items()}
    return actual


def _attended(choices: Mapping[str, Any], options: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    arguments = MODEL | {"dtype": dtype} | {"layout": "zigzag"} | choices
    plan = make_plan(101, **arguments)
    q, k, v, dout = (
        sixty_fourths(1, 101, heads, 16, seed=n).to(dtype) for n, heads in enumerate((8, plan.kv_heads, plan.kv_heads, 8))
    )
    extra: dict[str, Any] = {}
    if options.get("key_bias"):
        extra["key_bias"] = sixty_fourths(1, plan.kv_heads, 101, seed=5).to(dtype).requires_grad_()
    if options.get("sinks"):
        extra["sinks"] = sixty_fourths(8, seed=6).to(dtype).requires_grad_()
    softcap = {"softcap": options["softcap"]} if "softcap" in options else {}
    results = simulate(plan, q, k, v, dout, **extra, **softcap)
    return dict(zip((*PARTS, *(f"d{name}" for name in extra)), results, strict=True))


def sixty_fourths(*shape: int, seed: int) -> Tensor:
    """Numbers from -2 to 2, the same bits on every machine."""
    return torch.randint(-128, 129, shape, generator=torch.Generator().manual_seed(seed)).float() / 64


def summary(x: Tensor) -> dict[str, Any]:
    """The digest of all bits; and numbers that other machines can be compared with: 6 elements, the mean and the largest."""
    x = x.detach().contiguous()
    bits, flat = x.flatten().view(torch.uint8), x.flatten().double()
    finite = flat.where(flat.isfinite(), 0.0)
    picked = flat[:: max(1, len(flat) // 6)][:6].tolist()
    return {
        "sha256": sha256(bits.numpy().tobytes()).hexdigest()[:32],
        "shape": list(x.shape),
        "dtype": str(x.dtype).removeprefix("torch."),
        "values": [float(f"{value:.6g}") for value in (*picked, finite.mean().item(), finite.abs().max().item())],
    }


def fingerprint() -> str:
    """Of this machine's arithmetic: equal where torch's matmul, exp and attention give equal bits."""
    actual = [torch.__version__]
    for dtype in (torch.float32, torch.bfloat16):
        a, b, c = (sixty_fourths(1, 4, 60, 16, seed=n).to(dtype).requires_grad_() for n in range(3))
        out = nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True)
        rows = a[0, 0] @ sixty_fourths(16, 33, seed=4).to(dtype)
        result = [out, rows, rows.exp(), rows.sum(-1), rows.logsumexp(-1), torch.tanh(rows)]
        result += torch.autograd.grad(out, (a, b, c), sixty_fourths(*out.shape, seed=9).to(dtype))
        actual += [summary(x)["sha256"] for x in result]
    return sha256("".join(actual).encode()).hexdigest()[:32]


# Topologies


def topologies() -> dict[str, Any]:
    """The files that `Topology.save` writes."""
    return {name: _saved(topology).splitlines() for name, topology in {**PRESETS, "measured": MEASURED}.items()}


MEASURED = Topology(
    "measured",
    "matrix",
    1.5e12,
    world=2,
    latencies=((0.0, 1e-5), (2e-5, 0.0)),
    bandwidths=((1.0, 5e9), (4e9, 1.0)),
    port=6e9,
    launch=1e-5,
    memory=1e11,
)


def _saved(topology: Topology) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "topology.json"
        topology.save(path)
        return path.read_text()


# A job of two ranks: its event log, its checkpoint, and merging over ranks


def job_results() -> dict[str, Any]:
    """What two real ranks leave behind: events of their logs, files of their checkpoint, and merges of each policy."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _run_job(folder)
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(JOB_RANKS)]
        logs = {path.name: _events(path) for path in sorted((folder / "log").iterdir())}
        return {"events": logs, "checkpoint": _described(folder / "checkpoints"), "ranks": ranks}


def _run_job(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "LOCAL_", "GROUP_"))}
    common = inherited | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(JOB_RANKS),
        "LOCAL_WORLD_SIZE": str(JOB_RANKS),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", f"import golden_cases; golden_cases.job({rank}, {str(folder)!r})"],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(JOB_RANKS)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    if any(process.returncode for process in started):
        raise AssertionError("the job failed:\n" + "\n".join(errors))


def job(rank: int, folder: str) -> None:
    """One rank: attention, a checkpoint saved and loaded, and every merge policy, under an event log."""
    torch.set_num_threads(1)
    init_ranks("gloo", journal=Path(folder) / "log", timeout=40)
    plan = make_plan(37, world=JOB_RANKS, heads=4, kv_heads=2, head_dim=8, schedule="token_ring", topology="cpu")
    q, k, v = (shard(sixty_fourths(1, 37, heads, 8, seed=n), plan).requires_grad_() for n, heads in enumerate((4, 2, 2)))
    out = attention(q, k, v, plan)
    grads = torch.autograd.grad(out, (q, k, v), shard(sixty_fourths(1, 37, 4, 8, seed=3), plan))
    model, optimizer = trained()
    saved = save(Path(folder) / "checkpoints", 3, model, optimizer, config=CONFIG)
    assert load(saved, model, optimizer, config=CONFIG) == 3
    results = {
        "attention": {name: summary(x) for name, x in zip(("out", "dq", "dk", "dv"), (out, *grads), strict=True)},
        "merges": _merges(plan),
        "decoders": _decoders(),
    }
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(results))


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that is two numbers wide, after one step, with a fixed state of the random generator."""
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_(sixty_fourths(*parameter.shape, seed=n))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for n, parameter in enumerate(model.parameters()):
        parameter.grad = sixty_fourths(*parameter.shape, seed=10 + n)
    optimizer.step()
    torch.manual_seed(7)
    return model, optimizer


def _merges(plan: Plan) -> dict[str, Any]:
    """Groups by every policy, and rows merged and given back by them."""
    wide = make_plan(48, world=JOB_RANKS, heads=4, kv_heads=2, head_dim=8, schedule="ring", topology="cpu")
    every = make_plan(48, world=JOB_RANKS, heads=4, kv_heads=2, head_dim=8, schedule="ring", topology="cpu", mask=full())
    x = shard(sixty_fourths(2, 48, 8, seed=1), wide)
    y = shard(sixty_fourths(2, 48, 8, seed=1), every)
    flags = shard(sixty_fourths(2, 48, seed=2), wide) > 0.5
    actual = {
        "windows": (windows(48, 3, batch=2), wide),
        "words": (segments(gather_rows(flags, wide.layout)), wide),
        "grid": (grid(6, 8, batch=2), every),
        "deleted": (delete(~flags, wide.layout), wide),
        "similar": (similar(x, wide.layout, window=8, remove=0.4), wide),
        "similar, by threshold and energy": (similar(x, wide.layout, window=12, threshold=0.1, scorer="energy"), wide),
        "bipartite": (bipartite_merge(y, every.layout, remove=0.3), every),
        "bipartite, random": (bipartite_merge(y, every.layout, remove=0.3, scorer="random", seed=3), every),
        "windows of windows": (windows(48, 3, batch=2).then(windows(16, 2, batch=2)), wide),
    }
    values = {}
    for name, (merge, whole) in actual.items():
        short = shorten(merge, whole, schedule="ring")
        merged = short.merge(x if whole is wide else y)
        values[name] = {
            "digest": merge.digest,
            "plan": short.plan.digest,
            "groups": merge.into[0].tolist(),
            "merged": summary(merged),
            "back": summary(short.unmerge(merged)),
        }
    return values


def _decoders() -> dict[str, Any]:
    """The loss of a small decoder that merges by each policy."""
    config = DecoderConfig(vocab_size=64, dim=16, layers=3, heads=2, kv_heads=1, head_dim=8, hidden_dim=24)
    actual = {}
    for policy in ("windows", "similar", "bipartite", "words", "gate"):
        mask = full() if policy == "bipartite" else causal()
        plan = make_plan(48, world=JOB_RANKS, heads=2, kv_heads=1, head_dim=8, mask=mask, schedule="ring", topology="cpu")
        model = MergingDecoder(config, Merging(policy, 1, 2, schedule="ring"))
        with torch.no_grad():
            for n, parameter in enumerate(model.parameters()):
                parameter.copy_(sixty_fourths(*parameter.shape, seed=n) / 4)
        model.eval()
        tokens = torch.randint(64, (1, 48), generator=torch.Generator().manual_seed(1))
        loss = model.loss(shard(tokens, plan), shard(tokens.roll(-1, 1), plan), plan)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        groups = "" if model.short is None else model.short.groups.digest
        actual[policy] = {"groups": groups, "loss": summary(loss), "gradient": summary(gradient)}
    return actual


def _events(path: Path) -> dict[str, Any]:
    """The kind of each line in order, with its name if it has one; and by kind, the keys of its lines.

    Times differ from run to run, and whether a pass had to wait at all, so keys are those of all lines of a kind together.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = dict.fromkeys(line["event"] for line in lines)
    keys = {kind: sorted({key for line in lines if line["event"] == kind for key in line}) for kind in kinds}
    return {"keys": keys, "lines": [" ".join(filter(None, (line["event"], line.get("name")))) for line in lines]}


def _described(directory: Path) -> dict[str, Any]:
    """Names of a checkpoint's files, what `ringattn.json` says, and the tensors that the metadata lists."""
    (checkpoint,) = sorted(directory.iterdir())
    about = json.loads((checkpoint / "ringattn.json").read_text())
    stored = pickle.loads((checkpoint / ".metadata").read_bytes()).state_dict_metadata
    return {
        "directory": checkpoint.name,
        "files": sorted(path.name for path in checkpoint.iterdir()),
        "about": {name: sorted(value) if name == "files" else value for name, value in about.items()},
        "digits of a digest": sorted({len(value) for value in about["files"].values()}),
        "stored": sorted(stored),
    }


EVERYTHING = {
    "schedules": schedule_texts,
    "plans": plans,
    "priced": priced,
    "outputs": lambda: {"fingerprint": fingerprint(), "cases": outputs()},
    "topologies": topologies,
    "job": job_results,
}


def as_text(value: Any, indent: int = 0) -> str:
    """JSON in which whatever fits into 160 characters is one line, so that a difference is a line."""
    short = json.dumps(value)
    if len(short) + indent <= 160 or not isinstance(value, dict | list):
        return short
    pad, (opening, closing) = "\n" + " " * (indent + 1), "{}" if isinstance(value, dict) else "[]"
    if isinstance(value, dict):
        inner = [f"{json.dumps(name)}: {as_text(part, indent + 1)}" for name, part in value.items()]
    else:
        inner = [as_text(part, indent + 1) for part in value]
    return opening + pad + f",{pad}".join(inner) + "\n" + " " * indent + closing


def _write() -> None:
    STORED.mkdir(exist_ok=True)
    for name, compute in EVERYTHING.items():
        (STORED / f"{name}.json").write_text(as_text(compute()) + "\n")
    shutil.rmtree(STORED / "checkpoint", ignore_errors=True)
    save(STORED / "checkpoint", 3, *trained(), config=CONFIG)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _write()

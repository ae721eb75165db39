"""`attention` under torch.compile: one graph, the numbers and the errors of eager mode, and no more memory.

The operator is opaque, so most tests compile with aot_eager, which traces both passes and generates no code; inductor, which
takes seconds of C++ for every graph, compiles one block for each dtype and kind of plan.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import run_ranks
from torch import Tensor, nn
from torch._functorch.config import patch as no_autograd_cache
from torch.distributed.device_mesh import DeviceMesh
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from ringattn import InputError, LaunchError, Plan, RingAttnError, attention, causal, full, make_plan, positions, shard
from ringattn.execution.custom_op import graph_arguments
from ringattn.nn.rotary import apply_rotary, rotary

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor generates C++ and there is no g++")

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
Grads = tuple[Tensor, ...]


def plan_for(world: int, **changes: Any) -> Plan:
    kwargs: dict[str, Any] = dict(world=world, heads=4, kv_heads=2, head_dim=8, mask=causal(), schedule="token_ring")
    return make_plan(changes.pop("length", 13), **kwargs | changes)


def plans_for(world: int, **changes: Any) -> list[Plan]:
    """Plans of Ulysses, whose inputs are resident away from their owners and kept, and of a schedule without such inputs."""
    return [plan_for(world, **changes), plan_for(world, schedule="ring", ulysses=world, **changes)]


def inputs(plan: Plan, rank: int = 0, *, extra: bool = False, batch: int = 2) -> dict[str, Tensor]:
    """q, k and v, and with `extra` also key_bias and sinks, as leaves."""
    torch.manual_seed(0)
    heads = {"q": plan.heads, "k": plan.kv_heads, "v": plan.kv_heads}
    dtype = getattr(torch, plan.dtype)
    full_tensors = {name: torch.randn(batch, plan.seq_len, h, plan.head_dim, dtype=dtype) for name, h in heads.items()}
    own = {name: shard(x, plan, rank=rank) for name, x in full_tensors.items()}
    if extra:
        own["key_bias"] = shard(torch.randn(batch, plan.seq_len), plan, rank=rank)
        own["sinks"] = torch.randn(plan.heads)
    return {name: x.requires_grad_() for name, x in own.items()}


def only(**kwargs: Any) -> Tensor:
    return attention(**kwargs)


def both(function: Callable[..., Tensor], kwargs: dict[str, Any], leaves: list[Tensor]) -> Iterator[Tensor]:
    """The result, and the gradients of a loss that treats no two elements alike."""
    out = function(**kwargs)
    yield out.detach()
    weight = torch.arange(out.numel(), dtype=torch.float32).reshape(out.shape).sin()
    yield from torch.autograd.grad((out.float() * weight).sum(), leaves)


def same_bits(plan: Plan, rank: int = 0, *, extra: bool = False, dynamic: bool | None = None, **options: Any) -> bool:
    """Whether `attention` and its gradients, compiled without a graph break, have the same bits as in eager mode."""
    torch._dynamo.reset()
    leaves = inputs(plan, rank, extra=extra)
    kwargs = {**leaves, "plan": plan, **options}
    eager = list(both(only, kwargs, list(leaves.values())))
    function = torch.compile(only, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    compiled = list(both(function, kwargs, list(leaves.values())))
    return all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


# ---- one process


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_same_bits(dtype: str) -> None:
    assert same_bits(plan_for(1, dtype=dtype))
    assert same_bits(plan_for(1, dtype=dtype), extra=True, softcap=3.0, scale=0.3)


class Block(nn.Module):
    """The parts of a transformer block that stand around attention."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan, self.sizes = plan, [plan.heads, plan.kv_heads, plan.kv_heads]
        dtype = getattr(torch, plan.dtype)
        self.project = nn.Linear(16, sum(self.sizes) * plan.head_dim, dtype=dtype)
        self.out = nn.Linear(plan.heads * plan.head_dim, 16, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (-1, self.plan.head_dim)).split(self.sizes, dim=2)
        out = attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, self.plan)
        y: Tensor = x + self.out(out.flatten(-2))
        return y


def block_by_inductor(plan: Plan, rank: int = 0) -> None:
    """Fused code sums in another order, and rounds to bf16 less often than one operator after another."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    block = Block(plan)
    x = shard(torch.randn(2, plan.seq_len, 16, dtype=getattr(torch, plan.dtype)), plan, rank=rank).requires_grad_()
    cos, sin = rotary(positions(plan, rank), plan.head_dim, 1e4)
    kwargs, leaves = {"x": x, "cos": cos, "sin": sin}, [x, *block.parameters()]
    eager = list(both(block, kwargs, leaves))
    # Graphs are not cached, else an old one could hide one that cannot be made now; C++ is compiled once for all ranks.
    with torch._inductor.config.patch(compile_threads=1, fx_graph_cache=False), no_autograd_cache(enable_autograd_cache=False):
        compiled = list(both(torch.compile(block, fullgraph=True), kwargs, leaves))
    tolerance = {"float32": 1e-5, "bfloat16": 5e-2}[plan.dtype]
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * a.abs().max().item())


@pytest.mark.slow
@needs_compiler
def test_a_block_compiled_by_inductor() -> None:
    block_by_inductor(plan_for(1, length=6))


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_the_operator_passes_torchs_checks(extra: bool, gradient: bool) -> None:
    plan = plan_for(1, dtype="bfloat16")  # results are in more than one dtype
    kwargs = inputs(plan, extra=extra)
    if not gradient:
        kwargs = {name: x.detach() for name, x in kwargs.items()}
    arguments = [kwargs.get(name) for name in ("q", "k", "v", "key_bias", "sinks")]
    opcheck(
        torch.ops.ringattn.attention, (*arguments, *graph_arguments(plan, None), None, 2.0, gradient, None), test_utils=OPCHECKS
    )


def test_another_plan_is_another_graph() -> None:
    torch._dynamo.reset()
    plans = [plan_for(1), plan_for(1, mask=full()), plan_for(1)]
    compiled = torch.compile(only, backend="aot_eager", fullgraph=True)
    kwargs = inputs(plans[0])
    for plan in plans:
        assert torch.equal(compiled(**kwargs, plan=plan), only(**kwargs, plan=plan))
    assert not torch.equal(only(**kwargs, plan=plans[0]), only(**kwargs, plan=plans[1]))


def test_batch_sizes_share_a_graph() -> None:
    torch._dynamo.reset()
    plan = plan_for(1)
    compiled = torch.compile(only, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, stance in ((5, "default"), (7, "fail_on_recompile")):  # no two equal dims, else torch would treat them as one
        leaves = inputs(plan, extra=True, batch=batch)
        kwargs = {**leaves, "plan": plan}
        eager = list(both(only, kwargs, list(leaves.values())))
        with torch.compiler.set_stance(stance):
            actual = list(both(compiled, kwargs, list(leaves.values())))
        assert all(torch.equal(x, y) for x, y in zip(eager, actual, strict=True))


def test_lse_and_no_grad() -> None:
    torch._dynamo.reset()
    plan = plan_for(1)
    kwargs = inputs(plan)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(**kwargs: Any) -> tuple[Tensor, Tensor]:
        return attention(**kwargs, return_lse=True)

    out, lse = compiled(**kwargs, plan=plan)
    assert torch.equal(lse, attention(**kwargs, plan=plan, return_lse=True)[1])
    assert out.requires_grad and not lse.requires_grad
    with torch.no_grad():
        assert torch.equal(compiled(**kwargs, plan=plan)[0], out)


def test_autocast() -> None:
    torch._dynamo.reset()
    plan = plan_for(1, dtype="bfloat16")
    kwargs = {name: x.detach().float().requires_grad_() for name, x in inputs(plan).items()}
    compiled = torch.compile(only, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        a = list(both(only, {**kwargs, "plan": plan}, list(kwargs.values())))
        b = list(both(compiled, {**kwargs, "plan": plan}, list(kwargs.values())))
    assert a[0].dtype == torch.bfloat16 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda x: {**x, "q": x["q"][:, :-1]}, InputError, r"q has shape \(2, 12, 4, 8\), the plan expects \(2, 13, 4, 8\)"),
        (lambda x: {**x, "q": x["q"].transpose(1, 2)}, InputError, "heads and rows are swapped"),
        (lambda x: {**x, "q": x["q"][0]}, InputError, "q has shape"),
        (lambda x: {**x, "k": x["k"][0]}, InputError, "k has shape"),
        (lambda x: {**x, "v": x["v"].double()}, InputError, "v has dtype torch.float64 and the plan is for float32; cast v"),
        (lambda x: {**x, "key_bias": torch.zeros(13)}, InputError, "key_bias has shape"),
        (lambda x: {**x, "scale": 0.0}, InputError, "scale=0.0: must be finite"),
        (lambda x: {**x, "plan": plan_for(2)}, LaunchError, "torchrun --nproc-per-node"),
    ],
)
def test_errors_are_those_of_eager_mode(change, error: type[Exception], text: str) -> None:
    torch._dynamo.reset()
    kwargs = change({**inputs(plan_for(1)), "plan": plan_for(1)})
    with pytest.raises(error, match=text) as eager:
        only(**kwargs)
    with pytest.raises(error, match=text) as compiled:
        torch.compile(only, backend="aot_eager", fullgraph=True)(**kwargs)
    assert type(compiled.value) is type(eager.value) and str(compiled.value) == str(eager.value)


def test_importing_attention_does_not_import_the_compiler() -> None:
    code = "import sys, ringattn.execution.attention; print('torch._dynamo' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert process.stdout.strip() == "False", process.stderr


# ---- several processes; each function below runs on every rank


def every_form(rank: int) -> None:
    """Both kinds of plan, and a group as a mesh, as a process group and by default."""
    ring, ulysses = plans_for(3)
    assert same_bits(ring, rank, extra=True, softcap=3.0)
    assert same_bits(ulysses, rank, extra=True, softcap=3.0, dynamic=True)
    assert same_bits(plans_for(3, dtype="bfloat16")[1], rank)
    arguments = [*inputs(ulysses, rank).values(), None, None, *graph_arguments(ulysses, None), None, None, True, None]
    opcheck(torch.ops.ringattn.attention, tuple(arguments), test_utils=OPCHECKS)
    mesh = DeviceMesh("cpu", [1, 2])
    if rank:  # its rank in the group differs from that in the world
        for plan, group in zip(plans_for(2), (mesh, mesh.get_group()), strict=True):
            assert same_bits(plan, rank - 1, group=group)


@pytest.mark.slow
def test_the_same_bits_on_several_ranks() -> None:
    run_ranks(3, every_form)


def blocks(rank: int) -> None:
    ring, ulysses = plan_for(2, length=12), plans_for(2, length=12, dtype="bfloat16")[1]
    for plan in (ring, ulysses):  # six rows each, as above: C++ is compiled once for all
        block_by_inductor(plan, rank)


@pytest.mark.slow
@needs_compiler
def test_blocks_compiled_by_inductor_on_two_ranks() -> None:
    run_ranks(2, blocks)


def saved(function: Callable[..., Tensor], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Bytes that a call keeps for backward, and how many of q, k and v are among them."""
    sizes: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(**kwargs)
    out.sum().backward()
    return sum(sizes.values()), sum(kwargs[name].untyped_storage().data_ptr() in sizes for name in "qkv")


def memory(rank: int) -> list[tuple[int, int, int, int]]:
    results = []
    for plan in plans_for(dist.get_world_size()):
        torch._dynamo.reset()
        kwargs = {**inputs(plan, rank), "plan": plan}
        compiled = torch.compile(only, backend="aot_eager", fullgraph=True)
        results.append((*saved(only, kwargs), *saved(compiled, kwargs)))
    return results


def checkpointed(rank: int) -> None:
    """Around a compiled call, within a compiled function, and neither."""
    for plan in plans_for(dist.get_world_size()):
        torch._dynamo.reset()
        leaves = inputs(plan, rank)
        tensors = list(leaves.values())

        def twice(q: Tensor, k: Tensor, v: Tensor, plan: Plan = plan) -> Tensor:
            return attention(attention(q.sin(), k, v, plan), k, v, plan)

        def recomputed(q: Tensor, k: Tensor, v: Tensor, twice: Callable[..., Tensor] = twice) -> Tensor:
            return checkpoint(twice, q, k, v, use_reentrant=False)

        inner = torch.compile(twice, backend="aot_eager", fullgraph=True)
        forms = [twice, recomputed, torch.compile(recomputed, backend="aot_eager", fullgraph=True)]
        forms.append(lambda q, k, v, inner=inner: recomputed(q, k, v, inner))
        plain, *others = [list(both(form, leaves, tensors)) for form in forms]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def checkpointed_and_memory(rank: int) -> list[tuple[int, int, int, int]]:
    checkpointed(rank)
    return memory(rank)


def test_what_is_saved_and_what_is_computed_again() -> None:
    """As many bytes as in eager mode, and of Ulysses none of q, k and v; checkpointing changes no bit."""
    for ring, ulysses in run_ranks(2, checkpointed_and_memory):
        assert ring[0] == ring[2] and ring[1] == ring[3] == 3
        assert ulysses[0] == ulysses[2] and ulysses[1] == ulysses[3] == 0


def caught(rank: int) -> list[str]:
    """The errors that rank 1's mistakes raise on this rank."""
    errors = []
    plan, other = plan_for(3), plan_for(3, schedule="ring")
    mesh = dist.init_device_mesh("cpu", (3, 1), mesh_dim_names=("a", "b"))
    mistakes: list[dict[str, Any]] = [{"rows": 1}, {"plan": other}, {"scale": 0.5}, {"group": mesh}]
    for mistake in mistakes:
        torch._dynamo.reset()
        kwargs = {**inputs(plan, rank), "plan": plan}
        if rank == 1 or "group" in mistake:
            kwargs |= {"q": kwargs["q"][:, :-1]} if "rows" in mistake else mistake
        try:
            torch.compile(only, backend="aot_eager", fullgraph=True)(**kwargs)
        except RingAttnError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_every_rank_raises_for_one_ranks_mistake() -> None:
    errors = run_ranks(3, caught)
    assert errors[0] == errors[1] == errors[2]
    prefixes = [
        "InputError: on rank 1: q has shape",
        "MismatchError: ranks disagree on schedule: forward",
        "MismatchError: ranks disagree on scale",
    ]
    prefixes.append("MismatchError: group is a mesh of 2 dimensions")
    assert len(errors[0]) == len(prefixes), errors
    assert all(text.startswith(start) for text, start in zip(errors[0], prefixes, strict=True)), errors

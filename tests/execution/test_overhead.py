"""Work around the kernel: few launches, no unneeded copies, nothing computed twice, no untouched rows."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Example, example, simulate, worst
from torch import Tensor

from ringattn import Plan, causal, full, make_plan
from ringattn.comm.simulated import Simulated
from ringattn.comm.wire_format import Spec, Wire
from ringattn.execution.autograd import Inputs, attend
from ringattn.kernels import KERNELS, Operands, Options, Rows, fused, get
from ringattn.kernels.lse import Partial
from ringattn.kernels.sdpa import Sdpa
from ringattn.schedule import mesh, ring, token_ring

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

MOST_FORWARD, MOST_BACKWARD = 3, 6  # launches per tile that are not attention


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("name", ["ring", "token_ring"])
def test_launches_per_tile(name: str, mask: str) -> None:
    """On fake CUDA tensors; each of our Triton kernels counts as one."""
    from launches import count

    launches_per_tile = count(name, mask)
    assert 0 < launches_per_tile.forward <= MOST_FORWARD and 0 < launches_per_tile.backward <= MOST_BACKWARD, launches_per_tile


def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Calls of the kernel and of the functions that prepare them, in order."""
    calls: list[tuple[str, Any]] = []

    class Recording(Sdpa):
        def forward(self, block: Operands, segments: Any, options: Options) -> Partial:
            calls.append(("forward", block))
            return super().forward(block, segments, options)

        def backward(self, block: Operands, rows: Rows, segments: Any, options: Options) -> Any:
            calls.append(("backward", (block, rows)))
            return super().backward(block, rows, segments, options)

    monkeypatch.setitem(KERNELS, "sdpa", Recording)
    get.cache_clear()
    monkeypatch.setattr(
        "ringattn.execution.blocks.surrogate_out", lambda *a: (calls.append(("surrogate", a[0])), fused.surrogate_out(*a))[1]
    )
    return calls


@pytest.fixture(autouse=True)
def own_kernels():
    yield
    get.cache_clear()


def plan_and_example(schedule: Any, world: int, mask: Any = None, **options: Any) -> tuple[Plan, Example]:
    mask = mask or full()
    arguments: dict[str, Any] = dict(heads=4, kv_heads=2, head_dim=8, dtype="float64", mask=mask, schedule=schedule) | options
    return make_plan(8 * world, world=world, **arguments), example((4, 2), 8 * world, mask)


def test_half_tiles_compute_half_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a causal mask, zigzag: a tile above the diagonal has half of the rows, one below it half of the keys."""
    calls = recorded_calls(monkeypatch)
    plan, e = plan_and_example(token_ring(4), 4, causal(), layout="zigzag")
    assert worst(simulate(plan, e.q, e.k, e.v, e.dout), (e.out, e.lse, *e.grads)) < 1e-12
    shapes = [(block.q.shape[2], block.k.shape[2]) for name, block in calls if name == "forward"]
    assert sorted(shapes) == sorted([(8, 8)] * 4 + [(4, 8)] * 6 + [(8, 4)] * 6)


@pytest.mark.parametrize(
    ("schedule", "surrogates"), [(ring(4), 0), (token_ring(4), 12), (mesh(4), 4)], ids=["ring", "token", "mesh"]
)
def test_a_surrogate_is_computed_once_for_each_remote_block(schedule: Any, surrogates: int, monkeypatch) -> None:
    """KV rings compute with the true out; in a 2 x 2 mesh a block of queries visits one other rank, with two blocks of keys."""
    calls = recorded_calls(monkeypatch)
    plan, e = plan_and_example(schedule, 4)
    assert worst(simulate(plan, e.q, e.k, e.v, e.dout), (e.out, e.lse, *e.grads)) < 1e-12
    assert sum(name == "surrogate" for name, _ in calls) == surrogates
    assert sum(name == "backward" for name, _ in calls) == 16
    own = [rows.out for name, (_, rows) in calls[-16:] if name == "backward" and rows.out is not None]
    assert len(own) == sum(name == "backward" for name, _ in calls[-16:])


def test_a_single_rank_returns_the_kernels_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    results: list[Partial] = []
    forward = Sdpa.forward
    monkeypatch.setattr(Sdpa, "forward", lambda *a: (results.append(forward(*a)), results[-1])[1])
    plan, e = plan_and_example(ring(1), 1, causal())
    q, k, v = (x.detach().requires_grad_() for x in (e.q, e.k, e.v))
    ((out, lse),) = attend([Inputs(q, k, v)], plan, Options(plan.head_dim**-0.5), Simulated(1))
    assert out.data_ptr() == results[0].out.data_ptr()
    assert torch.equal(lse, results[0].lse)  # of which the CPU's operator returns a transposed view
    assert out.is_contiguous() and lse.is_contiguous()
    torch.testing.assert_close(out, e.out, rtol=1e-12, atol=1e-12)


def test_results_of_one_message_share_no_memory() -> None:
    """A rank without keys gets all of out and lse in one message, one without queries dk, dv and dbias.

    Compiled operators refuse results that share memory, and in eager mode one that is changed would count as change of all.
    """
    for schedule, rows, keys in ((token_ring(2), 8, 1), (ring(2), 1, 8)):
        plan = make_plan(rows, kv_len=keys, world=2, heads=2, head_dim=8, mask=full(), schedule=schedule, layout="contiguous")
        q = [torch.randn(1, plan.rows(rank), 2, 8) for rank in range(2)]
        kv = [torch.randn(2, 1, plan.kv_rows(rank), 2, 8) for rank in range(2)]
        bias = [torch.randn(1, plan.kv_rows(rank)) for rank in range(2)]
        inputs = [Inputs(q[r], kv[r][0].clone(), kv[r][1].clone(), bias[r]) for r in range(2)]
        leaves = [[x.requires_grad_() for x in of_rank[:4] if x is not None] for of_rank in inputs]
        results = attend(inputs, plan, Options(plan.head_dim**-0.5), Simulated(2))
        for (out, lse), of_rank in zip(results, leaves, strict=True):
            grads = torch.autograd.grad(sum(o.sum() for o, _ in results), of_rank, retain_graph=True)
            tensors = [x for x in (out, lse, *grads) if x.numel()]
            assert len({x.untyped_storage().data_ptr() for x in tensors}) == len(tensors)


@pytest.mark.parametrize("schedule", [ring(4), token_ring(4), mesh(4)], ids=["ring", "token_ring", "mesh"])
def test_messages_may_be_handed_over(schedule: Any) -> None:
    """The simulated transport without its copies: the same bits, and nothing that was sent is written to."""
    plan, e = plan_and_example(schedule, 4, causal(), layout="zigzag")
    before = [x.detach().clone() for x in (e.q, e.k, e.v, e.dout)]
    copied, handed = (simulate(plan, e.q, e.k, e.v, e.dout, transport=Simulated(4, copy=copy)) for copy in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(copied, handed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, (e.q, e.k, e.v, e.dout), strict=True))


def test_backward_inside_autocast_is_that_outside() -> None:
    plan, e = plan_and_example(token_ring(2), 2, kernel="reference", dtype="float32")
    grads = []
    for on in (False, True):
        inputs = [
            Inputs(*(x.detach()[:, r].float().requires_grad_() for x in (e.q, e.k, e.v))) for r in (range(8), range(8, 16))
        ]
        results = attend(inputs, plan, Options(0.3), Simulated(2))
        leaves = [x for i in inputs for x in i[:3]]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            grads.append(torch.autograd.grad([out for out, _ in results], leaves, [torch.ones_like(out) for out, _ in results]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_spans_have_names_only_under_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    original = torch.profiler.record_function
    monkeypatch.setattr("ringattn.execution.engine.record_function", lambda name: (opened.append(name), original(name))[1])
    plan, e = plan_and_example(token_ring(2), 2)
    simulate(plan, e.q, e.k, e.v, e.dout)
    assert not opened
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        simulate(plan, e.q, e.k, e.v, e.dout)
    assert {"ringattn/step0/post", "ringattn/step1/wait", "ringattn/step0/tile(0,0)"} <= set(opened)


@pytest.mark.parametrize(
    "dtypes", [("bfloat16",), ("float32", "bfloat16"), ("bfloat16", "float32", "float64"), ("uint8", "float32")]
)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (2, 3, 0, 4), (2, 3, 5)])
def test_a_message_holds_what_was_packed(dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    specs = [Spec(shape, getattr(torch, dtype)) for dtype in dtypes] + [Spec(shape[:3], torch.float32)]
    wire = Wire(specs)
    for laid_out in ("as in kernels", "otherwise", "cast"):
        tensors = [torch.randint(0, 99, spec.shape).to(spec.dtype) for spec in specs]
        sent = [like_a_kernel(t) if laid_out == "as in kernels" else t for t in tensors]
        sent = [t.double() for t in sent] if laid_out == "cast" else sent
        message = wire.pack(sent)
        assert message.ndim == 1 and message.is_contiguous() and message.nbytes == wire.nbytes == sum(s.nbytes for s in specs)
        for view, tensor in zip(wire.views(message), tensors, strict=True):
            assert torch.equal(view, tensor) and view.dtype == tensor.dtype
            assert view.ndim != 4 or view.transpose(1, 2).is_contiguous()


def like_a_kernel(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim == 4 else x


def test_a_message_of_one_tensor_is_its_memory() -> None:
    q = torch.randn(2, 5, 3, 4)
    wire = Wire([Spec((2, 3, 5, 4), torch.float32)])
    assert wire.pack([q.transpose(1, 2)]).data_ptr() == q.data_ptr()
    half = torch.randn(2, 10, 3, 4)[:, 5:]  # rows of a longer sequence are no single run of memory
    assert torch.equal(wire.views(wire.pack([half.transpose(1, 2)]))[0], half.transpose(1, 2))

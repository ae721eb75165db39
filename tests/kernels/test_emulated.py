"""The emulated accelerator takes the time that the flops would take, and nothing else."""

import time

import pytest
import torch

from ringattn import PlanError, attention, causal, make_plan
from ringattn.kernels import Emulated, Operands, Options, Rows, get
from ringattn.sequence.segments import CAUSAL, Segment

FLOPS = 1e9
ARGUMENTS = dict(world=1, heads=4, kv_heads=2, head_dim=16, mask=causal())


def test_it_takes_its_time_and_leaves_the_core_free() -> None:
    q, k = torch.randn(1, 4, 200, 16), torch.randn(1, 2, 200, 16)
    kernel, segments, area = get("emulated:1e9"), (Segment(0, 200, 0, 200, CAUSAL),), 200 * 201 // 2
    begin, cpu = time.perf_counter(), time.process_time()
    out, lse = kernel.forward(Operands(q, k, k, None), segments, Options(1.0))
    middle = time.perf_counter()
    grads = kernel.backward(Operands(q, k, k, None), Rows(q, lse, lse), segments, Options(1.0))
    end = time.perf_counter()
    seconds = 4 * area * 16 * 4 / FLOPS
    assert middle - begin >= seconds and end - middle >= 2.5 * seconds, "sleep may be late, never early"
    assert time.process_time() - cpu < seconds
    assert out.shape == q.shape and lse.shape == q.shape[:-1] and not out.any()
    assert [g.shape for g in grads[:3]] == [q.shape, k.shape, k.shape] and grads.dbias is None


def test_a_plan_names_it_and_is_priced_by_it() -> None:
    slow, fast = (make_plan(64, **ARGUMENTS, kernel=f"emulated:{flops}") for flops in ("1e6", "1e12"))
    assert slow.kernel == "emulated:1e+06" and isinstance(get(slow.kernel), Emulated)
    assert float(slow.notes.split("forward ")[1].split(" ms")[0]) > 100 * float(fast.notes.split("forward ")[1].split(" ms")[0])
    q, k = torch.ones(1, 64, 4, 16), torch.ones(1, 64, 2, 16)
    assert not attention(q, k, k, fast).any()


@pytest.mark.parametrize("kernel", ["emulated:", "emulated:fast", "emulated:-1", "emulated:inf", "emulated:0"])
def test_invalid_rates_raise(kernel: str) -> None:
    with pytest.raises(PlanError, match="pass the flop/s to emulate as a positive number"):
        make_plan(64, **ARGUMENTS, kernel=kernel)

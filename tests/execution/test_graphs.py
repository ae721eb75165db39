"""CUDA graphs: a known call on which ranks need not agree is captured, every other raises; compiled operators stay out.

A stand-in replaces the answers of torch.cuda; transfers use gloo.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from spawn import run_ranks
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from ringattn import InputError, attention, causal, make_plan, shard, unshard
from ringattn.comm import consistency as agreement
from ringattn.comm import process_group as group
from ringattn.execution import arguments

NOT_CAPTURED = {
    "the default where tensors are the CPU's": dict(),
    "strict": dict(strict=True),
    "strict, by a text": dict(strict="layer 3"),
    "check_finite": dict(strict=False, check_finite=True),
    "a call of another kind": dict(strict=False, scale=0.5),
}


def both_passes(q: Tensor, k: Tensor, v: Tensor, plan: Any, **options: Any) -> list[Tensor]:
    out = attention(q, k, v, plan, **options)
    return [out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))]


def captures(rank: int) -> dict[str, str]:
    """The errors of calls that cannot be captured, while a graph is captured, in which nothing may be exchanged."""
    plan = make_plan(13, world=2, heads=2, head_dim=8, mask=causal(), schedule="token_ring")
    torch.manual_seed(0)
    q, k, v = (shard(torch.randn(1, 13, 2, 8), plan).requires_grad_() for _ in range(3))
    eager = both_passes(q, k, v, plan, strict=False)
    exchange, errors = agreement._exchange, {}

    def never(*args: Any) -> None:
        raise AssertionError("ranks exchanged something while a graph was captured")

    agreement._exchange = never
    agreement.capturing = arguments.capturing = lambda device: True
    captured = both_passes(q, k, v, plan, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))
    for name, options in NOT_CAPTURED.items():
        try:
            attention(q, k, v, plan, **options)
            errors[name] = "no error"
        except InputError as error:
            errors[name] = str(error)
    for name, call in {"an argument": lambda: attention(q[:, 1:], k, v, plan), "unshard": lambda: unshard(q, plan)}.items():
        try:
            call()
        except InputError as error:
            errors[name] = str(error)
    asynchronous, agreement.is_asynchronous = agreement.is_asynchronous, lambda device: True
    agreement._exchange, agreement.capturing = exchange, lambda device: False
    both_passes(q, k, v, plan)
    agreement._exchange, agreement.capturing = never, lambda device: True
    both_passes(q, k, v, plan)  # for tensors on GPUs the default is to agree once
    agreement._exchange, agreement.is_asynchronous = exchange, asynchronous
    return errors


def test_a_known_call_is_captured_and_every_other_raises_on_every_rank_with_a_hint() -> None:
    for errors in run_ranks(2, captures):
        assert list(errors) == [*NOT_CAPTURED, "an argument", "unshard"]
        error_text = errors.pop("an argument")
        assert error_text.startswith("q has shape"), error_text
        for name, text in errors.items():
            hint = "check_finite=False" if name == "check_finite" else "once before the capture, and both with strict=False"
            assert "CUDA graph is being captured" in text and hint in text, (name, text)


def test_numbers_are_not_read_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor on a single rank, which agrees with no other."""
    monkeypatch.setattr(arguments, "capturing", lambda device: True)
    plan, q = make_plan(6, world=1, heads=2, head_dim=8), torch.full((1, 6, 2, 8), torch.nan)
    attention(q, q, q, plan)
    with pytest.raises(InputError, match=r"check_finite=True: a CUDA graph is being captured, .* pass check_finite=False"):
        attention(q, q, q, plan, check_finite=True)


def test_torch_is_not_queried_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch without CUDA raises when queried whether a stream is capturing."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert not group.capturing(cpu) and not group.capturing(cuda)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not group.capturing(cpu) and not group.capturing(cuda), "nothing captures before CUDA is used"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not group.capturing(cpu) and group.capturing(cuda)


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="torch has the tag from 2.8 on")
def test_inductor_keeps_both_operators_out_of_cuda_graphs() -> None:
    from torch._inductor.utils import is_cudagraph_unsafe_fx_node

    unsafe: dict[str, bool] = {}

    def collect(module: fx.GraphModule, example: Any) -> Any:
        for node in module.graph.nodes:
            if str(node.target).startswith("ringattn"):
                unsafe[str(node.target)] = is_cudagraph_unsafe_fx_node(node)
        return make_boxed_func(module.forward)

    plan = make_plan(6, world=1, heads=2, head_dim=8)
    q = torch.randn(1, 6, 2, 8, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: attention(q, q, q, plan), backend=aot_autograd(fw_compiler=collect, bw_compiler=collect))
    compiled(q).sum().backward()
    assert unsafe == {"ringattn.attention.default": True, "ringattn.attention_backward.default": True}
    for name in ("attention", "attention_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.ringattn, name).default.tags
    plain = fx.Graph().call_function(torch.ops.aten.sin.default, (SimpleNamespace(),))
    assert not is_cudagraph_unsafe_fx_node(plain)

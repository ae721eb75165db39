"""Groups started in every usual way: with one backend, two, or none named, as a mesh, a slice of one, or a sub-group."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cases import EXACT, HEADS, example, worst
from processes import free_port
from spawn import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: F401  (registers the backend "fake")

from ringattn import InputError, attention, causal, make_plan, shard, unshard
from ringattn.comm import consistency as agreement
from ringattn.comm import gloo_duplex as duplex
from ringattn.comm import process_group as group
from ringattn.integrations.mpu import sequence_parallel
from ringattn.nn import reduce_gradients

CUDA = torch.device("cuda", 0)
StartedGroup = dist.ProcessGroup | dist.DeviceMesh | None


def started(backend: str | None) -> Callable[[str, int, int], StartedGroup]:
    def start(file: str, rank: int, port: int) -> None:
        dist.init_process_group(backend, store=dist.FileStore(file, 4), rank=rank, world_size=4)

    return start


def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> Callable[[str, int, int], StartedGroup]:
    def start(file: str, rank: int, port: int) -> StartedGroup:
        os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="4", LOCAL_RANK=str(rank))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return mesh["sequence"]

    return start


def halves(backend: str | None) -> Callable[[str, int, int], StartedGroup]:
    def start(file: str, rank: int, port: int) -> StartedGroup:
        started(backend)(file, rank, port)
        return [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])][rank // 2]

    return start


WAYS = {
    "no backend": started(None),
    "cpu:gloo": started("cpu:gloo"),
    # In place of NCCL another backend, which cannot move anything.
    "cpu:gloo,cuda:nccl": started("cpu:gloo,cuda:fake"),
    "init_device_mesh": mesh_of((4,), ("sequence",)),
    "slice of a mesh": mesh_of((2, 2), ("data", "sequence")),
    "new_group of no backend": halves(None),
    "new_group of two backends": halves("cpu:gloo,cuda:fake"),
}


def in_every_way(rank: int, folder: Path, ports: list[int]) -> list[str]:
    """Forward and backward in each group, with the second connection that gloo has in all of them; returns failed checks."""
    wrong = []
    dist.destroy_process_group()
    for port, (name, start) in zip(ports, WAYS.items(), strict=True):
        started_group = start(str(folder / name), rank, port)
        members = started_group.get_group() if isinstance(started_group, dist.DeviceMesh) else started_group or dist.group.WORLD
        world, own = dist.get_world_size(members), dist.get_rank(members)
        plan = make_plan(19, world=world, heads=4, head_dim=8, dtype="float64", mask=causal(), schedule="token_ring")
        e = example(HEADS["mha"], 19, causal())
        q, k, v = (shard(x.detach(), plan, rank=own).requires_grad_() for x in (e.q, e.k, e.v))
        out = attention(q, k, v, plan, group=started_group)
        actual = (out.detach(), *torch.autograd.grad(out, (q, k, v), shard(e.dout, plan, rank=own)))
        expected = tuple(shard(x, plan, rank=own) for x in (e.out.detach(), *e.grads))
        gathered = unshard(out.detach(), plan, group=started_group)
        weight = torch.ones(2, requires_grad=True)
        weight.grad = torch.full((2,), 1.0 + own)
        reduce_gradients([weight], started_group)
        checks = {
            "attention": worst(actual, expected) < EXACT,
            "unshard": worst((gathered,), (e.out.detach(),)) < EXACT,
            "sum": weight.grad.tolist() == [world * (world + 1) / 2] * 2,
            "second connection": members in duplex._twins,
            "device": group.device_of(members).type == "cpu",
            "mesh": started_group is not None or sequence_parallel(2).mesh.device_type == ("cuda" if "cuda" in name else "cpu"),
        }
        wrong += [f"{name}: {what}" for what, good in checks.items() if not good]
        dist.barrier()
        dist.destroy_process_group()
    return wrong


def test_every_usual_way_to_start_a_group(tmp_path: Path) -> None:
    ports = [free_port() for _ in WAYS]
    assert run_ranks(4, in_every_way, tmp_path, ports) == [[]] * 4


class Group:
    """What torch would answer about a group with these backends, {"cuda": "nccl"}."""

    def __init__(self, **names: str) -> None:
        self._device_types = [torch.device(device) for device in names]
        self._names = names

    def _get_backend(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(name=lambda: self._names[device.type])


@pytest.mark.parametrize(
    ("names", "served", "small"),
    [
        (dict(cuda="nccl"), {"cuda": "nccl"}, "cuda"),
        (dict(cpu="gloo", cuda="nccl"), {"cpu": "gloo", "cuda": "nccl"}, "cpu"),
        (dict(cuda="nccl", cpu="gloo"), {"cpu": "gloo", "cuda": "nccl"}, "cpu"),
        (dict(cuda="gloo", cpu="gloo"), {"cpu": "gloo"}, "cpu"),  # as "gloo" alone registers; it sends no GPU tensors
    ],
)
def test_what_a_group_moves(names: dict[str, str], served: dict[str, str], small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    fake = Group(**names)
    assert group.backends(fake) == served
    assert group.device_of(fake) == torch.device(small, 3 if small == "cuda" else None)
    assert group.supports_device(fake, CUDA) == ("cuda" in served) and group.supports_device(fake, torch.device("cpu")) == (
        "cpu" in served
    )


def test_a_tensor_that_the_group_cannot_move_is_named_with_a_hint() -> None:
    on_gpu, on_cpu = SimpleNamespace(device=CUDA), torch.empty(2)
    assert (
        group.cannot_move(None, "q", on_gpu) is None and group.cannot_move(Group(cpu="gloo", cuda="nccl"), "q", on_gpu) is None
    )
    message = group.cannot_move(Group(cpu="gloo"), "q", on_gpu)
    assert message is not None and message.startswith("q is on cuda:0 and the gloo group moves tensors on cpu; ")
    assert message.endswith("backend='nccl'")
    message = group.cannot_move(Group(cuda="nccl"), "x", on_cpu)
    assert message is not None and "x is on cpu and the nccl group moves tensors on cuda; " in message


def both_devices(rank: int, folder: Path) -> None:
    """In a group with both backends: tensors of the CPU by gloo's two connections, those of a GPU in one batch of the other
    backend, in which all ranks are connected before; and an agreement about a GPU's tensors by gloo, once."""
    dist.destroy_process_group()
    started("cpu:gloo,cuda:fake")(str(folder / "store"), rank, 0)
    members = dist.group.WORLD
    batches, connected, exchanged = [], [], []
    batch, all_reduce, exchange = duplex._as_batch, dist.all_reduce, agreement._exchange
    duplex._as_batch = lambda ops, *_: batches.append([op.tensor.device.type for op in ops]) or [SimpleNamespace(wait=bool)]
    dist.all_reduce = lambda tensor, group: connected.append(tensor.device)
    agreement._exchange = lambda *args: exchanged.append(rows := exchange(*args)) or rows
    zeros, on_gpu = torch.zeros, SimpleNamespace(device=CUDA, is_cpu=False)
    torch.zeros = lambda *shape, device=None: SimpleNamespace(device=device) if device else zeros(*shape)
    for _ in range(3):
        agreement.agree(members, {"call": "on GPUs"}, device=on_gpu.device)
    assert len(exchanged) == 1 and exchanged[0][0].device.type == "cpu" and connected == [CUDA] and not batches
    outgoing, incoming = torch.full((3,), float(rank)), torch.zeros(3)
    duplex.finish([duplex.sending(outgoing, members, rank, rank ^ 1), duplex.receiving(incoming, members, rank, rank ^ 1)])
    assert (incoming == rank ^ 1).all() and not batches
    duplex.finish([duplex.sending(on_gpu, members, rank, rank ^ 1), duplex.receiving(on_gpu, members, rank, rank ^ 1)])
    assert batches == [["cuda", "cuda"]]
    for _ in range(2):
        agreement.agree(members, {"call": "on CPUs"})
    assert len(exchanged) == 3, "tensors of the CPU are agreed on in every call"
    torch.zeros = zeros
    duplex._as_batch, dist.all_reduce, agreement._exchange = batch, all_reduce, exchange


def test_the_tensor_decides_which_backend_of_a_group_moves_it(tmp_path: Path) -> None:
    run_ranks(4, both_devices, tmp_path)


def wrong_device(rank: int) -> str:
    q = torch.empty(1, 8, 2, 4, device="meta") if rank == 1 else torch.zeros(1, 8, 2, 4)
    try:
        attention(q, q, q, make_plan(16, world=2, heads=2, head_dim=4))
    except InputError as error:
        return str(error)
    return ""


def test_every_rank_raises_for_a_wrong_device() -> None:
    for message in run_ranks(2, wrong_device):
        assert message.startswith("on rank 1: q is on meta and the gloo group moves tensors on cpu; move it there")

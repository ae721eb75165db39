"""Communication overlaps compute: a message is waited for only in its arrival step. Checked by order, not by seconds."""

from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
import torch
from cases import schedules
from spawn import run_ranks, torchrun
from torch import Tensor

from ringattn import full, make_plan
from ringattn.comm.p2p import P2P, P2PPort
from ringattn.comm.transport import Port
from ringattn.execution.blocks import Forward
from ringattn.execution.engine import run
from ringattn.execution.overlap import Overlap, overlap
from ringattn.kernels import Options
from ringattn.schedule.program import Message

ROOT = Path(__file__).parents[2]


class RecordingPort(Port):
    """A port that delivers zeros and records the order of calls."""

    def __init__(self, rank: int, record: list[tuple[str, object]]) -> None:
        self.rank, self.record = rank, record

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        self.record += [("post", message) for message, _ in transfers]

    def wait(self, message: Message) -> Generator[None, None, None]:
        self.record.append(("wait", message))
        yield from ()


@pytest.mark.parametrize("name", schedules(4))
def test_tiles_are_computed_between_the_post_and_the_wait_of_messages(name: str) -> None:
    plan = make_plan(32, world=4, heads=2, head_dim=8, mask=full(), schedule=schedules(4)[name])
    for rank in range(4):
        record: list[tuple[str, object]] = []
        ops = Forward(plan, rank, Options(1.0), **{x: torch.zeros(1, 2, 8, 8) for x in "qkv"})
        compute = ops.compute
        ops.compute = lambda *args, compute=compute, record=record: (record.append(("tile", args[0])), compute(*args))[1]
        for _ in run(plan.program(rank, backward=False), ops, RecordingPort(rank, record)):
            raise AssertionError("this port never waits")
        steps = {tile: step.number for step in plan.program(rank, backward=False) for tile in step.tiles}
        for message in (m for what, m in record if what == "post"):
            between = record[record.index(("post", message)) : record.index(("wait", message))]
            beside = [steps[tile] for what, tile in between if what == "tile"]
            assert beside == [step for step in sorted(steps.values()) if message.depart <= step < message.arrival]


def test_a_real_post_returns_before_its_transfer_is_done() -> None:
    run_ranks(2, posts_and_goes_on)


def posts_and_goes_on(rank: int) -> None:
    """Rank 1 posts late; rank 0's post must have returned by then, or both would be stuck here."""
    port: P2PPort = P2P(torch.distributed.group.WORLD).ports("forward")[0]
    message = Message(0, 1, 0, 1, ())
    buffer = torch.full((1 << 24,), rank, dtype=torch.uint8)
    if rank == 0:
        port.post([(message, buffer)])
    torch.distributed.barrier()
    if rank == 1:
        port.post([(message, buffer)])
    for _ in port.wait(message):
        pass
    assert (buffer == 0).all()


def measured(rank: int) -> list[float]:
    plan = make_plan(64, world=2, heads=2, head_dim=8, mask=full(), schedule="token_ring")
    overlaps = [overlap(plan, backward=backward, repeats=2) for backward in (False, True)]
    assert all(isinstance(o, Overlap) and min(o.together, o.compute, o.transfer) > 0 and 0 <= o.hidden <= 1 for o in overlaps)
    return [o.together for o in overlaps]


def test_overlap_is_the_same_on_every_rank() -> None:
    first, second = run_ranks(2, measured)
    assert first == second


def test_hidden_is_the_share_of_the_shorter_one() -> None:
    assert Overlap(together=10.0, compute=10.0, transfer=4.0).hidden == 1.0
    assert Overlap(together=14.0, compute=10.0, transfer=4.0).hidden == 0.0
    assert Overlap(together=12.0, compute=10.0, transfer=4.0).hidden == 0.5
    assert Overlap(together=1.0, compute=1.0, transfer=0.0).hidden == 1.0


def test_the_benchmark_runs(tmp_path: Path) -> None:
    flags = ["--seq-len", "128", "--heads", "2", "--kv-heads", "2", "--rounds", "1", "--json", str(tmp_path / "found.json")]
    code, out, err = torchrun(str(ROOT / "benchmarks" / "attention.py"), *flags, ranks=2)
    assert code == 0, err
    assert "token_ring" in out and "hidden" in out and (tmp_path / "found.json").exists()

"""Batches of NCCL, by stand-ins: one for each arrival step, so a wait includes no later message, and none blocks another."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import schedules

from ringattn import Plan, full, make_plan
from ringattn.comm import p2p
from ringattn.comm.gloo_duplex import Transfer
from ringattn.comm.p2p import P2P, P2PPort
from ringattn.schedule.program import Message

WORLD = 4


class Handle:
    """What NCCL returns for a batch: one handle for all of it."""

    def __init__(self, transfers: list[Transfer]) -> None:
        self.transfers, self.waited = transfers, 0

    def wait(self) -> bool:
        self.waited += 1
        return True


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Handle]]:
    """The batches that have been posted."""
    handles: list[Handle] = []
    monkeypatch.setattr(p2p, "waits_on_stream", lambda tensor: True)
    monkeypatch.setattr(p2p, "start", lambda transfers: [handles.append(Handle(transfers)) or handles[-1:]] * len(transfers))
    yield handles


def posted_by(plan: Plan, rank: int, backward: bool, batches: list[Handle]) -> list[tuple[list[Message], int]]:
    """The batches of a pass, each as its messages and the step it departs in; checks what each wait waits for."""
    transport = P2P(None)
    port, posted = P2PPort(transport, rank, "forward"), []
    messages: dict[int, Message] = {}
    for step in plan.program(rank, backward=backward):
        for message in step.arrival:
            before = [handle.waited for handle in batches]
            for _ in port.wait(message):
                pass
            for handle, count in zip(batches, before, strict=True):
                if handle.waited > count:
                    steps = {messages[id(transfer.tensor)].arrival for transfer in handle.transfers}
                    assert steps == {message.arrival}, f"{message} waits for messages of arrival steps {steps}"
        if step.post:
            transfers = [(message, torch.empty(1, dtype=torch.uint8)) for message in step.post]
            messages |= {id(buffer): message for message, buffer in transfers}
            buffers_in_use.extend(buffer for _, buffer in transfers)
            count = len(batches)
            port.post(transfers)
            posted += [([messages[id(t.tensor)] for t in handle.transfers], step.number) for handle in batches[count:]]
    assert all(handle.waited for handle in batches), "everything posted is waited for"
    assert transport.seconds_waiting == 0, "the host has waited for nothing"
    return posted


buffers_in_use: list[torch.Tensor] = []  # so that no two buffers have one id


def blocked_batches(ranks: list[list[tuple[list[Message], int]]]) -> list[str]:
    """The batches that never end if each rank's stream runs its batches in order.

    A batch begins when those before it have ended and all messages due by its departure have arrived; it ends when both ends of
    all its messages have begun.
    """
    ended, begun, state = [0] * len(ranks), [False] * len(ranks), defaultdict(int)
    arrival = [[m for batch, _ in batches for m in batch] for batches in ranks]
    moved = True
    while moved:
        moved = False
        for rank, batches in enumerate(ranks):
            if ended[rank] == len(batches):
                continue
            batch, depart = batches[ended[rank]]
            if not begun[rank] and all(state[m] == 3 for m in arrival[rank] if m.arrival <= depart):
                begun[rank] = moved = True
                for message in batch:
                    state[message] += 1  # 2 when both ends have begun
            if begun[rank] and all(state[message] >= 2 for message in batch):
                ended[rank], begun[rank], moved = ended[rank] + 1, False, True
                for message in batch:
                    state[message] = 3
    return [f"rank {rank}: {batches[ended[rank]][0][0]}" for rank, batches in enumerate(ranks) if ended[rank] < len(batches)]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", schedules(WORLD))
def test_a_wait_waits_only_for_what_is_due_and_all_batches_end(name: str, backward: bool, batches: list[Any]) -> None:
    plan = make_plan(32, world=WORLD, heads=12, head_dim=8, mask=full(), schedule=schedules(WORLD)[name])
    ranks = []
    for rank in range(WORLD):
        batches.clear()
        ranks.append(posted_by(plan, rank, backward, batches))
        keys = [(depart, message.arrival) for messages, depart in ranks[-1] for message in messages]
        assert keys == sorted(keys), "batches are posted in the global order"
    for src in range(WORLD):  # NCCL has no tags: what goes from one rank to another has the same order at both ends
        for dst in range(WORLD):
            ends = [[m for batch, _ in ranks[rank] for m in batch if (m.src, m.dst) == (src, dst)] for rank in (src, dst)]
            assert ends[0] == ends[1]
    assert not blocked_batches(ranks)


def test_another_order_on_one_rank_would_block() -> None:
    """So the test above would detect it."""
    early, late = Message(0, 1, 0, 1, ()), Message(0, 1, 0, 2, ())
    right = [([early], 0), ([late], 0)]
    assert not blocked_batches([right, right])
    assert blocked_batches([right, right[::-1]]) == [f"rank 0: {early}", f"rank 1: {late}"]

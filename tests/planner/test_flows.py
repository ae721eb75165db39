"""Tests shared links: messages share ports evenly and follow each other on a link, with times worked out by hand."""

import pytest

from ringattn import Topology
from ringattn.planner.cost.flows import Flows
from ringattn.schedule.program import Message

SWITCH = Topology("s", "switch", flops=1.0, bandwidth=100.0)
MESH = Topology("m", "mesh", flops=1.0, bandwidth=100.0)


def ends(topology: Topology, *starts: tuple[float, int, int, int]) -> list[float]:
    """End time of each message, given as (start time, src, dst, bytes)."""
    messages = {Message(src, dst, 0, 1, ()): (when, nbytes) for when, src, dst, nbytes in starts}
    flows, ends_at, waiting = Flows(topology), {}, sorted(messages, key=lambda m: messages[m][0])
    while waiting or flows.next_end() < float("inf"):
        if waiting and messages[waiting[0]][0] < flows.next_end():
            now = messages[waiting[0]][0]
            starting = [m for m in waiting if messages[m][0] == now]
            flows.start(now, [(m, messages[m][1]) for m in starting])
            waiting = waiting[len(starting) :]
        else:
            now = flows.next_end()
            ends_at[flows.end()] = now
    return [ends_at[m] for m in messages]


def test_alone_a_message_takes_its_bytes_over_the_bandwidth() -> None:
    assert ends(SWITCH, (1.0, 0, 1, 250)) == [3.5]


def test_a_port_is_shared_evenly_and_freed_when_a_message_ends() -> None:
    """50 bytes/s each until the shorter ends at 2 s; then the other has the port to itself."""
    assert ends(SWITCH, (0.0, 0, 1, 100), (0.0, 0, 2, 300)) == [2.0, 4.0]
    assert ends(SWITCH, (0.0, 1, 0, 100), (0.0, 2, 0, 300)) == [2.0, 4.0]
    assert ends(MESH, (0.0, 0, 1, 100), (0.0, 0, 2, 300)) == [1.0, 3.0]


def test_a_later_message_takes_a_share_from_then_on() -> None:
    assert ends(SWITCH, (0.0, 0, 1, 200), (1.0, 0, 2, 100)) == [3.0, 3.0]


def test_messages_of_a_pair_follow_each_other() -> None:
    assert ends(SWITCH, (0.0, 0, 1, 100), (0.0, 0, 1, 200)) == [1.0, 3.0]
    assert ends(SWITCH, (0.0, 0, 1, 100), (0.0, 0, 1, 200), (0.0, 0, 2, 150)) == pytest.approx([2.0, 4.5, 3.0])


def test_the_narrowest_share_counts() -> None:
    """Three go into port 3, so each gets a third of it; the unused part of rank 0's own port is not redistributed."""
    assert ends(SWITCH, (0.0, 0, 3, 100), (0.0, 1, 3, 100), (0.0, 2, 3, 100), (0.0, 0, 4, 100)) == pytest.approx(
        [3.0, 3.0, 3.0, 2.0]
    )


def test_nothing_takes_no_time() -> None:
    assert ends(SWITCH, (0.5, 0, 1, 0), (0.5, 0, 1, 100)) == [0.5, 1.5]

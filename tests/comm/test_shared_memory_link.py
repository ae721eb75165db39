"""The end of a peer of a shared-memory link: what it had sent arrives, and then an error is raised."""

import socket
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ringattn.comm.shared_memory import Links
from ringattn.comm.shared_memory_link import Link, Transfer

LARGE, SMALL = 1 << 20, 100  # bytes; after a large message its receiver answers that the space is free again


class Pair:
    """Rank 0 sends and ends, rank 1 receives."""

    def __init__(self) -> None:
        own_end, peer_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.leaving, self.staying = Links({1: Link(1, own_end)}, 5.0), Links({0: Link(0, peer_end)}, 5.0)
        assert self.leaving.begin_call() == self.staying.begin_call() == 1

    def send(self, number: int, size: int) -> Tensor:
        sent = torch.arange(size).add_(number).to(torch.uint8)
        transfer = Transfer(1, number, sent)
        self.leaving.post(self.leaving.links[1], transfer, sends=True)
        assert transfer.finished  # for its sender
        return sent

    def expect(self, number: int, size: int) -> Transfer:
        transfer = Transfer(1, number, torch.zeros(size, dtype=torch.uint8))
        self.staying.post(self.staying.links[0], transfer, sends=False)
        return transfer

    def receive(self, number: int, size: int) -> Tensor:
        transfer = self.expect(number, size)
        self.staying.wait(self.staying.links[0], transfer)
        return transfer.buffer


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair_of_links = Pair()
    yield pair_of_links
    for links in (pair_of_links.leaving, pair_of_links.staying):
        links.close("the test has ended")


def test_what_was_sent_arrives_although_the_sender_left_an_answer_unread(pair: Pair) -> None:
    """The system then reports a reset first, and returns what had been sent before only in the next call."""
    assert torch.equal(pair.send(0, LARGE), pair.receive(0, LARGE))
    last = [pair.send(number, SMALL) for number in (1, 2)]
    pair.leaving.close()
    assert all(torch.equal(sent, pair.receive(number, SMALL)) for number, sent in enumerate(last, 1))
    with pytest.raises(RuntimeError, match="rank 0 has ended"):
        pair.receive(3, SMALL)


def test_what_was_sent_arrives_although_an_answer_to_it_fails(pair: Pair) -> None:
    """The sender ends after its messages were looked for and before it receives the frame that frees their space."""
    sent, got, link = pair.send(0, LARGE), pair.expect(0, LARGE), pair.staying.links[0]
    link._read()
    last = pair.send(1, SMALL)
    pair.leaving.close()
    link._pull()
    assert link.lost and torch.equal(got.buffer, sent)
    assert torch.equal(last, pair.receive(1, SMALL))


def test_an_unreferenced_link_is_closed() -> None:
    """Like the links of a group that has ended: no warning of an open socket, and its peer notices."""
    own_end, peer_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    link = Link(1, own_end)
    del own_end
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        del link
    assert not caught
    with peer_end:
        assert peer_end.recv(1) == b""

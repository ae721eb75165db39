"""Defines the interface of transports, as the engine uses it.

A `Port` is one rank's end. `post` starts the transfers of one departure, all at once, in the order given; `wait` ends one of
them. `wait` is a generator so that one engine serves both kinds of transport: a real port blocks inside it and never yields; a
simulated one yields until another rank, in the same process, has sent.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ringattn.comm.wire_format import Wire
from ringattn.schedule.program import Message

Result = TypeVar("Result")


class Port(Protocol):
    """One rank's access to its peers."""

    rank: int

    def allocate(self, wire: Wire, device: torch.device) -> Tensor:
        """A tensor into which a message of this layout can be received."""
        return wire.empty(device)

    def post(self, transfers: Sequence[tuple[Message, Tensor]]) -> None:
        """Start sending (where `message.src` is this rank) or receiving each message from or into its contiguous buffer.

        A sent buffer may be the caller's own tensor: it is only read, and not used after `wait`.
        """

    def wait(self, message: Message) -> Generator[None, None, Tensor | None]:
        """Return when `message` has been sent or received completely; its buffer may then be used.

        A received message is in the buffer that was posted for it, unless another is returned: the buffer of a peer in the
        same process. It is read-only.
        """


class Transport(Protocol):
    """The ranks that this process hosts: its own, or all of them when simulated."""

    @property
    def ranks(self) -> Sequence[int]: ...

    def ports(self, label: str) -> Sequence[Port]:
        """A port for each hosted rank, for one pass over a schedule; `label` names the pass in errors."""

    def drive(self, runs: Sequence[Generator[None, None, Result]]) -> list[Result]:
        """Run each hosted rank's engine to its end."""

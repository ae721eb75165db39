"""Moves bytes between two processes of one host: data through a ring of shared memory, control frames over a Unix socket.

The sender owns the ring: an anonymous memory file whose descriptor is passed over the socket, so it has no name that could
clash or be left behind, and the size of /dev/shm does not limit it. The sender copies a chunk into the ring and sends a frame
with its position; the receiver copies it out and sends a frame that frees the space. Socket calls order memory on every CPU, a
process that waits for one sleeps, and the end of a process closes its sockets, which the peer notices at once.

Each frame names the call, the message and the position it belongs to. Frames of a call that this process has abandoned are
dropped; any other disagreement is an error, never wrong numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
import struct
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 20  # bytes copied per frame: a frame costs tens of microseconds, as much as copying a few 100 KB
SMALLEST, LARGEST = 1 << 20, 1 << 26  # bytes of a ring; it grows to what is in flight at once
DATA, FREE = 0, 1  # kinds of frames
LAYOUT = struct.Struct("<8q")
ANCILLARY_BYTES = socket.CMSG_SPACE(struct.calcsize("i"))


class Frame(NamedTuple):
    """DATA: `size` bytes lie at `at` in the ring, from `start` of message `number` of `call`, `total` bytes long.
    FREE: the oldest `size` bytes of the ring have been read. ring: counts the rings of this direction."""

    kind: int
    ring: int
    size: int
    call: int = 0
    number: int = 0
    total: int = 0
    start: int = 0
    at: int = 0


class Transfer:
    """One message to or from a peer. buffer: uint8, contiguous, on the CPU; done: bytes that have been copied."""

    def __init__(self, call: int, number: int, buffer: Tensor) -> None:
        self.call, self.number, self.buffer, self.total = call, number, buffer, buffer.numel()
        self.done, self.finished = 0, False

    def advance(self, size: int) -> None:
        self.done += size
        self.finished = self.done == self.total


def shared_memory(size: int) -> int:
    """File descriptor of `size` allocated bytes: a write to unallocated ones would end the process by SIGBUS.

    Raises `OSError` when memory is short.
    """
    descriptor = os.memfd_create("ringattn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def mapped(descriptor: int) -> Tensor:
    """The memory behind `descriptor` as a uint8 tensor; it stays mapped as long as the tensor exists."""
    size = os.fstat(descriptor).st_size
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)  # no page fault while copying
    with torch.inference_mode(False):  # a tensor created in inference mode could not be written outside
        return torch.frombuffer(mmap.mmap(descriptor, size, flags=flags), dtype=torch.uint8)


class Link:
    """Both directions between this process and the one behind `connection`, a connected SOCK_SEQPACKET socket.

    No method blocks. lost: why the connection has ended, empty while it is open; blocked: frames wait for space in the socket.
    """

    def __init__(self, peer: int, connection: socket.socket) -> None:
        self.peer, self.socket = peer, connection
        self.lost, self.blocked = "", False
        connection.setblocking(False)
        self._sends: deque[Transfer] = deque()
        self._receives: deque[Transfer] = deque()
        self._arrived: deque[tuple[Frame, Tensor | None]] = deque()  # with the new ring that begins with this frame
        self._out: Tensor | None = None
        self._out_number = 0
        self._new_descriptor: int | None = None  # descriptor of a new ring, until the peer has it
        self._at = self._used = 0  # next byte to write; bytes that the peer has not read yet
        self._in: Tensor | None = None
        self._in_number = 0
        self._unreported = 0  # bytes read and not yet reported as free

    @property
    def pending(self) -> bool:
        return bool(self._sends or self._receives)

    @property
    def ready(self) -> bool:
        """Whether a frame has been read whose message can be copied now: the socket will not report it again."""
        return bool(self._arrived and self._receives)

    def send(self, transfer: Transfer) -> None:
        """Start `transfer`: what fits into the ring is copied now, the rest by later calls of `progress`."""
        self._sends.append(transfer)
        self._grow(self._used + sum(queued.total - queued.done for queued in self._sends))
        self._push()

    def receive(self, transfer: Transfer) -> None:
        self._receives.append(transfer)

    def progress(self) -> None:
        """Read frames, copy out received data, free its space, and send what fits."""
        self._read()
        again = True
        while again:
            self._pull()
            self._report_free()
            self._push()
            again = self.ready  # looking for free space reads all frames

    def abandon(self) -> None:
        """Drop all transfers of an unfinished call. The next message begins a new ring."""
        if self.pending:
            self._sends.clear()
            self._receives.clear()
            self._close_descriptor()
            self._out, self._used = None, 0
            self._out_number += 1  # space freed in the old ring does not count in the new one

    def close(self) -> None:
        """End the connection in this process; a forked child leaves the parent's open."""
        self.lost = self.lost or "this rank has closed the connection"
        self._close_descriptor()
        self.socket.close()

    def __del__(self) -> None:
        self.close()  # a link ends with its group; a descriptor not yet passed to the peer would stay open

    def _grow(self, wanted: int) -> None:
        """Make a ring for `wanted` bytes in flight, at most `LARGEST`. If memory is short, keep the present one."""
        if self._out is not None and (wanted <= self._out.numel() or self._out.numel() == LARGEST):
            return
        size = min(LARGEST, max(SMALLEST, 1 << (wanted - 1).bit_length()))
        try:
            descriptor = shared_memory(size)
            ring = mapped(descriptor)
        except OSError as error:
            if self._out is None:
                raise RuntimeError(
                    f"no {size:,} bytes of shared memory ({error}); free memory, or init(transport='p2p')"
                ) from error
            return
        self._close_descriptor()
        self._out, self._new_descriptor = ring, descriptor
        self._out_number += 1
        self._at = self._used = 0

    def _push(self) -> None:
        while self._sends and not self.lost:
            transfer, ring = self._sends[0], self._out
            assert ring is not None
            size = min(transfer.total - transfer.done, self._space(ring), CHUNK)
            if size == 0 and transfer.total > 0:
                return
            start, at = transfer.done, self._at
            ring[at : at + size].copy_(transfer.buffer[start : start + size])
            frame = Frame(DATA, self._out_number, size, transfer.call, transfer.number, transfer.total, start, at)
            if not self._write(frame):
                return
            self._at, self._used = at + size, self._used + size
            transfer.advance(size)
            if transfer.finished:
                self._sends.popleft()

    def _space(self, ring: Tensor) -> int:
        """Contiguous bytes that can be written."""
        if self._used == ring.numel():
            self._read()
        if self._used == 0 or self._at == ring.numel():
            self._at = 0  # all has been read: reuse the same memory, which is in the cache
        return min(ring.numel() - self._at, ring.numel() - self._used)

    def _pull(self) -> None:
        while self._arrived and self._receives:
            (frame, ring), transfer = self._arrived[0], self._receives[0]
            if ring is not None:
                self._in, self._in_number, self._unreported = ring, frame.ring, 0
                self._arrived[0] = (frame, None)
            if frame.call >= transfer.call:
                self._copy_out(frame, transfer)
            self._arrived.popleft()
            self._unreported += frame.size
            if transfer.finished:
                self._receives.popleft()
            self._report_free()

    def _copy_out(self, frame: Frame, transfer: Transfer) -> None:
        received = (frame.call, frame.number, frame.total, frame.start)
        expected = (transfer.call, transfer.number, transfer.total, transfer.done)
        ring = self._in
        if received != expected or ring is None or frame.ring != self._in_number or frame.at + frame.size > ring.numel():
            raise RuntimeError(
                f"rank {self.peer} sent {_format_position(received)} where this rank expects {_format_position(expected)}: one "
                "of the two has given up a call that the other still makes"
            )
        transfer.buffer[frame.start : frame.start + frame.size].copy_(ring[frame.at : frame.at + frame.size])
        transfer.advance(frame.size)

    def _report_free(self) -> None:
        """Report read bytes, but not after every small message: each frame wakes a peer that may wait for another one."""
        enough = self._in is not None and self._unreported >= self._in.numel() // 4
        if enough and not self.lost and self._write(Frame(FREE, self._in_number, self._unreported)):
            self._unreported = 0

    def _write(self, frame: Frame) -> bool:
        """Send a frame, with the ring's descriptor in the first one of a new ring. False if the socket has no space now."""
        data = LAYOUT.pack(*frame)
        try:
            if frame.kind == DATA and self._new_descriptor is not None:
                socket.send_fds(self.socket, [data], [self._new_descriptor])
                self._close_descriptor()
            else:
                self.socket.send(data)
        except BlockingIOError:
            self.blocked = True
            return False
        except OSError as error:
            self._read()  # the peer may have sent all that is needed before it ended
            self._mark_lost(str(error))
            return False
        self.blocked = False
        return True

    def _read(self) -> None:
        """Read all received frames; data stays in the ring until its message is expected here."""
        while not self.lost:
            try:
                data, passed, _, _ = self.socket.recvmsg(LAYOUT.size, ANCILLARY_BYTES)
            except BlockingIOError:
                return None
            except ConnectionResetError:
                continue  # reported once where the peer ended with frames unread; what it had sent follows
            except OSError as error:
                return self._mark_lost(str(error))
            if len(data) != LAYOUT.size:
                return self._mark_lost()
            frame = Frame(*LAYOUT.unpack(data))
            if frame.kind == FREE:
                self._used -= frame.size if frame.ring == self._out_number else 0
                continue
            self._arrived.append((frame, _received_ring(passed[0][2]) if passed else None))
        return None

    def _mark_lost(self, why: str = "") -> None:
        self.lost = f"connection closed by peer: rank {self.peer} has ended or given up{why and f' ({why})'}"

    def _close_descriptor(self) -> None:
        if self._new_descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._new_descriptor)
            self._new_descriptor = None


def _received_ring(passed: bytes) -> Tensor:
    (descriptor,) = struct.unpack("i", passed[: struct.calcsize("i")])
    try:
        return mapped(descriptor)
    finally:
        os.close(descriptor)


def _format_position(position: tuple[int, int, int, int]) -> str:
    call, number, total, start = position
    return f"byte {start:,} of {total:,} of message {number} of call {call}"

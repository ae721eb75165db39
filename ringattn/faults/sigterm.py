"""SIGTERM to a rank that waits for others: first it says whom it misses, then it ends.

torchrun sends SIGTERM to all ranks as soon as one has died, and the system ends them before they have said a word. A handler
written in Python runs in the main thread, which is inside the backend while it waits. So the signal is also written to a
socket, which the board's thread reads; it decides when this process ends. Only where nobody else handles SIGTERM when the group
is made, and nobody has taken it over since.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import NoReturn

from ringattn.faults.event_log import note

IMPATIENT = 0.1  # seconds between looks, once the signal has come


class Farewell:
    """Whether this process has been told to end, where that is ours to see to. To be made in the main thread."""

    def __init__(self) -> None:
        self._heard = 0.0  # when; 0 if never
        self._over = True
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        if threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGTERM)
        former = getattr(handler, "__self__", None)  # that of an earlier group, which only the main thread can put away
        if isinstance(former, Farewell) and former._over:
            former._restore()
            handler = signal.SIG_DFL
        if handler is signal.SIG_DFL:
            before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            if before == -1:
                signal.signal(signal.SIGTERM, self._hear)
                os.register_at_fork(after_in_child=self.forget)
                self._over = False
            else:  # an event loop listens there
                signal.set_wakeup_fd(before)

    @property
    def told(self) -> bool:
        return self._heard > 0

    def wait(self, seconds: float) -> None:
        """Return when so much time has passed, or as soon as the signal comes."""
        until = time.monotonic() + (min(seconds, IMPATIENT) if self.told else seconds)
        while (left := until - time.monotonic()) > 0:
            self._ear.settimeout(left)
            try:
                numbers = self._ear.recv(64)
            except TimeoutError:
                return
            if signal.SIGTERM in numbers and not self._over and signal.getsignal(signal.SIGTERM) == self._hear:
                self._heard = self._heard or time.monotonic()
                return

    def due(self, patience: float) -> bool:
        """Whether the signal came that many seconds ago."""
        return self.told and time.monotonic() - self._heard >= patience

    def take(self, said: str) -> NoReturn:
        """End this process, with the status that a shell gives to one that the signal has ended."""
        try:
            note("told to end", said=said)
            print(said, file=sys.stderr, flush=True)
        finally:
            os._exit(128 + signal.SIGTERM)

    def forget(self) -> None:
        """From now on the signal does what it does by default."""
        if not self._over:
            self._over = True
            if threading.current_thread() is threading.main_thread():
                self._restore()

    def _restore(self) -> None:
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) == self._hear:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _hear(self, *_: object) -> None:
        """In the main thread, when it comes to it: after the board's thread, unless somebody has taken the socket away."""
        if self._over:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._heard = self._heard or time.monotonic()

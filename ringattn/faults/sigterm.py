"""Delays the end of a rank that receives SIGTERM while it waits for others, until it has reported which rank it waits for.

torchrun sends SIGTERM to all ranks as soon as one has died, and by default they end before they have written an error. A
handler written in Python runs in the main thread, which is inside the backend while it waits. So the signal is also written to
a socket, which the watchdog's watching thread reads; that thread decides when this process ends. Active only where no other
code handles SIGTERM when the group is created, or takes it over later.
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

POLL = 0.1  # seconds between polls, once the signal has arrived


class SigtermHandler:
    """Receives SIGTERM where no other code does. To be created in the main thread."""

    def __init__(self) -> None:
        self._received_at = 0.0  # monotonic seconds at the signal; 0 before
        self._inactive = True
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        if threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGTERM)
        previous = getattr(handler, "__self__", None)  # that of an earlier group, which only the main thread can remove
        if isinstance(previous, SigtermHandler) and previous._inactive:
            previous._restore()
            handler = signal.SIG_DFL
        if handler is signal.SIG_DFL:
            before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            if before == -1:
                signal.signal(signal.SIGTERM, self._on_signal)
                os.register_at_fork(after_in_child=self.deactivate)
                self._inactive = False
            else:  # an event loop uses the wakeup descriptor
                signal.set_wakeup_fd(before)

    @property
    def received(self) -> bool:
        return self._received_at > 0

    def wait(self, seconds: float) -> None:
        """Return after `seconds`, or as soon as the signal arrives."""
        until = time.monotonic() + (min(seconds, POLL) if self.received else seconds)
        while (remaining := until - time.monotonic()) > 0:
            self._reader.settimeout(remaining)
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                return
            if signal.SIGTERM in numbers and not self._inactive and signal.getsignal(signal.SIGTERM) == self._on_signal:
                self._received_at = self._received_at or time.monotonic()
                return

    def received_before(self, seconds: float) -> bool:
        """Whether the signal arrived at least that many seconds ago."""
        return self.received and time.monotonic() - self._received_at >= seconds

    def end_process(self, message: str) -> NoReturn:
        """End this process, with the status that a shell reports for one ended by the signal."""
        try:
            note("told to end", said=message)
            print(message, file=sys.stderr, flush=True)
        finally:
            os._exit(128 + signal.SIGTERM)

    def deactivate(self) -> None:
        """Restore the default action of the signal."""
        if not self._inactive:
            self._inactive = True
            if threading.current_thread() is threading.main_thread():
                self._restore()

    def _restore(self) -> None:
        signal.set_wakeup_fd(-1)
        if signal.getsignal(signal.SIGTERM) == self._on_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_signal(self, *_: object) -> None:
        """Runs in the main thread, and so after the watching thread, unless the wakeup socket was replaced."""
        if self._inactive:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self._received_at = self._received_at or time.monotonic()

"""Noticing at once that another process has ended.

A collective does not fail when a process that takes part in it is killed: the others wait, on some
machines forever. So each process keeps one idle connection to process 0. The operating system
closes it when the process ends, however that happens, and process 0 tells the others. A machine
that vanishes without closing anything is left to JAX's heartbeats (`dsjax.parallel.processes`).
"""

from __future__ import annotations

import contextlib
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Callable

_TOKEN_BYTES = 16  # a secret, so that strangers cannot pose as one of the processes
_GREETING = struct.Struct(f"!{_TOKEN_BYTES}sI")
_NUMBER = struct.Struct("!I")
_RELEASE = b"."
_PATIENCE_SECONDS = 10.0

OnLoss = Callable[[int], None]


class First:
    """The side of process 0.

    Attributes:
      port, token: what the other processes need to connect.
    """

    def __init__(self, on_loss: OnLoss):
        """
        Args:
          on_loss: called from a thread, with the number of the process that has ended.
        """
        self._on_loss = on_loss
        self._lines: dict[int, socket.socket] = {}
        self._released: set[int] = set()
        self._closed = threading.Event()
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual)
        self.port: int = self._listener.getsockname()[1]
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Tells the others that this process may end from now on."""
        for line in list(self._lines.values()):
            _send(line, _RELEASE)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        for line in self._lines.values():
            line.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._closed.is_set():
                for key, _ in selector.select(timeout=0.5):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        self._read(selector, key.data)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        line, _ = self._listener.accept()
        line.settimeout(_PATIENCE_SECONDS)
        try:
            token, number = _GREETING.unpack(line.recv(_GREETING.size, socket.MSG_WAITALL))
        except (OSError, struct.error):
            token, number = b"", 0
        if not secrets.compare_digest(token, self.token):
            line.close()
            return
        self._lines[number] = line
        selector.register(line, selectors.EVENT_READ, data=number)

    def _read(self, selector: selectors.BaseSelector, number: int) -> None:
        line = self._lines[number]
        if _receive(line, 1) == _RELEASE:
            self._released.add(number)
            return
        selector.unregister(line)
        if number in self._released:
            return
        for other, there in self._lines.items():
            if other != number:
                _send(there, _NUMBER.pack(number))
        self._on_loss(number)


class Other:
    """The side of any other process."""

    def __init__(self, address: tuple[str, int], token: bytes, number: int, on_loss: OnLoss):
        """
        Raises:
          OSError: process 0 cannot be reached at this address.
        """
        self._on_loss = on_loss
        self._line = socket.create_connection(address, timeout=_PATIENCE_SECONDS)
        self._line.settimeout(None)
        self._line.sendall(_GREETING.pack(token, number))
        self._closed = False
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Tells the others that this process may end from now on."""
        _send(self._line, _RELEASE)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):  # the other end was faster
            self._line.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._line.close()

    def _watch(self) -> None:
        first = _receive(self._line, 1)
        if first == _RELEASE or self._closed:
            return
        rest = _receive(self._line, _NUMBER.size - 1) if first else b""
        number = first + rest
        self._on_loss(_NUMBER.unpack(number)[0] if len(number) == _NUMBER.size else 0)


def _receive(line: socket.socket, size: int) -> bytes:
    """Receives `size` bytes, or fewer if the connection has ended."""
    try:
        return line.recv(size, socket.MSG_WAITALL)
    except OSError:
        return b""


def _send(line: socket.socket, data: bytes) -> None:
    """Sends data to a process that may have ended."""
    with contextlib.suppress(OSError):
        line.sendall(data)

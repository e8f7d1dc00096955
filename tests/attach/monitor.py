"""QEMU's monitor (QMP) over a socket, for what the machine around a guest does: save, restore, move, reset."""

from __future__ import annotations

import json
import socket
from collections import deque
from typing import Any

ANSWER_TIMEOUT_S = 60
MIGRATION_TIMEOUT_S = 120
MESSAGE_LIMIT_BYTES = 1 << 20


class MonitorError(Exception):
    """The monitor refused a command, did not answer in time, or is gone with its QEMU."""


class Monitor:
    """One connection to the monitor of a running QEMU; `connection` stays the caller's to close."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._events: deque[dict[str, Any]] = deque()

    def negotiate(self) -> None:
        """Read the greeting and enter command mode; the first thing to do."""
        greeting = self._message(ANSWER_TIMEOUT_S)
        if "QMP" not in greeting:
            raise MonitorError(f"no greeting but {greeting}")
        self.execute("qmp_capabilities")
        self.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])

    def execute(self, command: str, **arguments: Any) -> Any:
        """Run a command and return what it answers; raise MonitorError with the reason when it is refused."""
        message = {"execute": command, "arguments": arguments}
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError as problem:
            raise MonitorError(f"{command}: {problem}") from problem
        while True:
            answer = self._message(ANSWER_TIMEOUT_S)
            if "event" in answer:
                self._events.append(answer)
            elif "error" in answer:
                raise MonitorError(f"{command} {arguments}: {answer['error'].get('desc')}")
            else:
                return answer["return"]

    def wait_for(self, event: str, timeout_s: float = ANSWER_TIMEOUT_S) -> dict[str, Any]:
        """Return the data of the next event of that name; what else happens before it is forgotten."""
        while True:
            message = self._events.popleft() if self._events else self._message(timeout_s)
            if message.get("event") == event:
                data: dict[str, Any] = message.get("data", {})
                return data

    def wait_until_migrated(self) -> None:
        """Return when a migration, in or out, has been completed; raise MonitorError when it failed."""
        while (status := self.wait_for("MIGRATION", MIGRATION_TIMEOUT_S)["status"]) != "completed":
            if status == "failed":
                raise MonitorError(f"migration failed: {self.execute('query-migrate')}")

    def _message(self, timeout_s: float) -> dict[str, Any]:
        self._connection.settimeout(timeout_s)
        while b"\n" not in self._received:
            try:
                received = self._connection.recv(65536)
            except OSError as problem:
                raise MonitorError(f"no answer: {problem}") from problem
            if not received:
                raise MonitorError("QEMU closed its monitor")
            self._received += received
            if len(self._received) > MESSAGE_LIMIT_BYTES:
                raise MonitorError(f"a message of more than {MESSAGE_LIMIT_BYTES} bytes")
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

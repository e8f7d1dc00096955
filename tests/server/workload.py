"""A client that does a bit of everything to its own part of a disk, many requests at a time, and checks every byte."""

import asyncio
import random
from collections.abc import Callable
from typing import NamedTuple

from nbd_protocol.constants import Command, CommandFlag, Errno, ReplyMode
from tests.server.clients import LIMIT_S, Client, Reply

KIB = 1 << 10

UNKNOWN = 0x1FF
"""No byte: what lies here could not be told after a write that failed."""


class Asked(NamedTuple):
    """A request that is under way."""

    command: Command
    offset: int
    length: int
    value: int
    flags: int


class Workload:
    """Random requests to `length` bytes at `start`, which nobody else writes.

    Args:
        client: the connection.
        start, length: its part of the disk in bytes; it reads as zeroes at first.
        seed: of all decisions.
        depth: most requests under way.
        largest: the longest read or write in bytes.
        fails: whether requests may fail.
    """

    def __init__(
        self,
        client: Client,
        start: int,
        length: int,
        *,
        seed: int,
        depth: int = 16,
        largest: int = 200 * KIB,
        fails: bool = False,
    ) -> None:
        self.client = client
        self.start = start
        self.length = length
        self.random = random.Random(seed)
        self.depth = depth
        self.largest = largest
        self.fails = fails
        self.model = [0] * (length // 512)
        """What each block of 512 bytes is filled with; every write fills whole blocks with one value."""
        self.asked: dict[int, Asked] = {}
        self.answered = 0
        self.failed = 0
        self.size = 1 << 62
        self.before_reply: Callable[[], None] | None = None

    # --- asking -------------------------------------------------------------------------------------------

    def _free_range(self) -> tuple[int, int] | None:
        """A range that no request is under way on, in bytes from `start` on."""
        for _ in range(8):
            length = 512 * self.random.choice([1, 8, 8, 8, 64, 128, 129, self.random.randint(1, self.largest // 512)])
            length = min(length, self.largest, self.length)
            offset = 512 * self.random.randint(0, (self.length - length) // 512)
            if all(
                offset + length <= other.offset or other.offset + other.length <= offset
                for other in self.asked.values()
            ):
                return offset, length
        return None

    def _next(self) -> Asked | None:
        place = self._free_range()
        if place is None:
            return None
        commands = [Command.READ] * 5 + [Command.WRITE] * 5 + [Command.WRITE_ZEROES, Command.FLUSH, Command.CACHE]
        if self.client.mode is not ReplyMode.SIMPLE:
            commands.append(Command.BLOCK_STATUS)
        command = self.random.choice(commands)
        flags = 0
        if command in (Command.WRITE, Command.WRITE_ZEROES) and self.random.random() < 0.1:
            flags = CommandFlag.FUA
        if command is Command.READ and self.client.mode is not ReplyMode.SIMPLE and self.random.random() < 0.1:
            flags = CommandFlag.DF
        if command is Command.FLUSH:
            return Asked(command, 0, 0, 0, flags)
        return Asked(command, *place, self.random.randint(1, 255), flags)

    async def ask(self) -> bool:
        """Send one request; False if there was no room for any."""
        asked = self._next()
        if asked is None:
            return False
        payload = bytes([asked.value]) * asked.length if asked.command is Command.WRITE else None
        offset = 0 if asked.command is Command.FLUSH else self.start + asked.offset
        length = 0 if payload is not None else asked.length
        cookie, buffers = self.client.prepared(asked.command, offset, length, asked.flags, payload)
        self.asked[cookie] = asked  # before it is sent: the answer may come while the end of it still leaves
        await self.client.send_bytes(b"".join(buffers))
        return True

    async def ask_refused(self) -> None:
        """A write behind the end of the disk, whose payload must be swallowed."""
        length = self.random.choice([512, 70 * KIB, self.largest])
        cookie, buffers = self.client.prepared(Command.WRITE, self.size, payload=bytes(length))
        self.asked[cookie] = Asked(Command.DISC, self.length, 0, 0, 0)
        await self.client.send_bytes(b"".join(buffers))

    # --- checking -----------------------------------------------------------------------------------------

    def check(self, asked: Asked, reply: Reply) -> None:
        """Hold a reply against what should lie there, and note what a write has changed."""
        self.answered += 1
        if asked.command is Command.DISC:
            assert reply.error == Errno.ENOSPC, reply
            return
        first, last = asked.offset // 512, (asked.offset + asked.length) // 512
        if reply.error:
            assert self.fails, (asked, reply)
            self.failed += 1
            if asked.command in (Command.WRITE, Command.WRITE_ZEROES):
                self.model[first:last] = [UNKNOWN] * (last - first)
            return
        if asked.command is Command.WRITE:
            self.model[first:last] = [asked.value] * (last - first)
        elif asked.command is Command.WRITE_ZEROES:
            self.model[first:last] = [0] * (last - first)
        elif asked.command is Command.READ:
            for number, block in enumerate(range(first, last)):
                expected = self.model[block]
                if expected != UNKNOWN:
                    found = reply.data[number * 512 : number * 512 + 512]
                    assert found.count(expected) == 512, f"{asked}: block {block} holds {bytes(found[:8])!r}…"

    async def hear(self) -> None:
        """Receive the reply to the oldest request."""
        cookie = next(iter(self.asked))
        reply = await self.client.reply(cookie)
        self.check(self.asked.pop(cookie), reply)

    # --- all of it ----------------------------------------------------------------------------------------

    async def run(self, count: int, *, refused: float = 0.0) -> None:
        """So many requests, and everything read back at the end."""
        room = asyncio.Semaphore(self.depth)
        sent = asyncio.Event()

        async def ask_all() -> None:
            for _ in range(count):
                await room.acquire()
                if self.random.random() < refused:
                    await self.ask_refused()
                else:
                    while not await self.ask():
                        await asyncio.sleep(0)
                sent.set()

        async def hear_all() -> None:
            for _ in range(count):
                while not self.asked:
                    sent.clear()
                    await sent.wait()
                if self.before_reply is not None:
                    self.before_reply()
                await self.hear()
                room.release()

        async with asyncio.timeout(LIMIT_S), asyncio.TaskGroup() as group:
            group.create_task(ask_all())
            group.create_task(hear_all())
        assert not self.asked
        await self.read_back()

    async def read_back(self) -> None:
        """Everything that is known to lie there, read once more."""
        step = max(self.largest // 512, 1) * 512
        for offset in range(0, self.length, step):
            length = min(step, self.length - offset)
            reply = await self.client.ask(Command.READ, self.start + offset, length)
            self.check(Asked(Command.READ, offset, length, 0, 0), reply)

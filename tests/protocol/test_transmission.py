"""Both ends of the transmission phase: talking to each other, cut at every byte, and fed with garbage."""

import random
import tracemalloc
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_protocol import messages
from nbd_protocol.constants import (
    MIB,
    ChunkType,
    Command,
    CommandFlag,
    Errno,
    ReplyMode,
    TransmissionFlag,
)
from nbd_protocol.errors import RemoteProtocolError
from nbd_protocol.transmission import (
    Batch,
    ClientTransmission,
    DataChunk,
    Done,
    ErrorChunk,
    Event,
    ExportRules,
    HoleChunk,
    Request,
    ServerTransmission,
    StatusChunk,
    replies_for,
)

SIZE = 16384
BLOCK = 512
LARGE = 2048
"""What counts as a large payload here, so that the conversations stay small."""
ALL_FLAGS = TransmissionFlag((1 << 13) - 1) & ~TransmissionFlag.READ_ONLY
BASE, DIRTY_BITMAP = 5, 9


class Receiver:
    """What a connection does around a transmission: keeps the tail, collects large payloads."""

    def __init__(self, transmission: ServerTransmission, max_requests: int = 3) -> None:
        self.transmission = transmission
        self.max_requests = max_requests
        self.tail = b""
        self.partial: Request | None = None

    def feed(self, piece: bytes) -> Iterator[Request]:
        self.tail += piece
        while True:
            if self.partial is not None:
                if len(self.tail) < self.partial.length:
                    return
                payload, self.tail = self.tail[: self.partial.length], self.tail[self.partial.length :]
                yield self.partial.with_payload(memoryview(payload))
                self.partial = None
            batch: Batch = self.transmission.parse(memoryview(self.tail), self.max_requests)
            self.tail = self.tail[batch.consumed :]
            yield from batch.requests
            self.partial = batch.partial
            if batch.needs_data and self.partial is None:
                assert len(self.tail) < self.transmission.header_size + LARGE, "more is held than is needed"
                return


class MemoryServer:
    """A disk in memory behind the server's half; it answers in chunks, in holes, and out of order."""

    def __init__(self, mode: ReplyMode, seed: int = 0) -> None:
        self.mode = mode
        self.disk = bytearray(SIZE)
        contexts = () if mode is ReplyMode.SIMPLE else (BASE, DIRTY_BITMAP)
        self.rules = ExportRules(SIZE, ALL_FLAGS, mode=mode, context_ids=contexts)
        self.receiver = Receiver(ServerTransmission(mode, large_payload=LARGE))
        self.replies = replies_for(mode)
        self.random = random.Random(seed)
        self.waiting: list[list[bytes]] = []

    def receive(self, piece: bytes) -> None:
        for request in self.receiver.feed(piece):
            if request.type != Command.DISC:
                self.waiting.append(list(self.answer(request)))

    def send(self) -> Iterator[bytes]:
        """Give what is to be sent, chunks of different replies between one another."""
        while self.waiting:
            reply = self.random.choice(self.waiting)
            yield reply.pop(0)
            if not reply:
                self.waiting.remove(reply)

    def answer(self, request: Request) -> Iterator[bytes]:
        refusal = self.rules.refusal(request)
        if refusal is not None:
            yield self.replies.error(request, *refusal)
        elif request.type == Command.READ:
            yield from self.answer_read(request)
        elif request.type == Command.BLOCK_STATUS:
            wanted = sorted(request.context_ids or self.rules.context_ids)
            for context_id in wanted:
                extents = list(self.extents(request, context_id))
                yield self.replies.block_status(request, context_id, extents, done=context_id == wanted[-1])
        else:
            self.change(request)
            yield self.replies.done(request)

    def change(self, request: Request) -> None:
        begin, end = request.offset, request.offset + request.length
        if request.type == Command.WRITE:
            assert request.payload is not None
            self.disk[begin:end] = request.payload
        elif request.type in (Command.WRITE_ZEROES, Command.TRIM):
            self.disk[begin:end] = bytes(request.length)

    def answer_read(self, request: Request) -> Iterator[bytes]:
        begin, end = request.offset, request.offset + request.length
        if not request.length:
            yield self.replies.done(request)
        elif not self.replies.can_send_holes or request.flags & CommandFlag.DF or self.random.random() < 0.3:
            header = bytearray(self.replies.read_header_size)
            self.replies.pack_read_header(header, 0, request.cookie, begin, request.length)
            yield bytes(header + self.disk[begin:end])
        else:
            pieces = list(self.pieces(begin, end))
            self.random.shuffle(pieces)
            separate_end = self.random.random() < 0.5
            for i, (offset, length) in enumerate(pieces):
                done = not separate_end and i == len(pieces) - 1
                data = bytes(self.disk[offset : offset + length])
                if any(data):
                    yield self.replies.read_data(request, offset, length, done=done) + data
                else:
                    yield self.replies.read_hole(request, offset, length, done=done)
            if separate_end:
                yield self.replies.done(request)

    def pieces(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Cut a range into pieces that are all data or all zeroes, block by block."""
        piece_begin = begin
        while begin < end:
            block_end = min(end, begin - begin % BLOCK + BLOCK)
            next_end = min(end, block_end + BLOCK)
            if block_end == end or any(self.disk[begin:block_end]) != any(self.disk[block_end:next_end]):
                yield piece_begin, block_end - piece_begin
                piece_begin = block_end
            begin = block_end

    def extents(self, request: Request, context_id: int) -> Iterator[tuple[int, int]]:
        for offset, length in self.pieces(request.offset, request.offset + request.length):
            yield length, self.state(offset, length, context_id)

    def state(self, offset: int, length: int, context_id: int) -> int:
        has_data = any(self.disk[offset : offset + length])
        return int(has_data) if context_id == DIRTY_BITMAP else 3 * (not has_data)


class MemoryClient:
    """The client's half, and what a driver does around it."""

    def __init__(self, mode: ReplyMode) -> None:
        contexts = () if mode is ReplyMode.SIMPLE else (BASE, DIRTY_BITMAP)
        self.transmission = ClientTransmission(mode, context_ids=contexts, large_payload=LARGE)
        self.tail = b""
        self.announced: DataChunk | None = None
        self.events: list[Event] = []

    def receive(self, piece: bytes) -> None:
        self.tail += piece
        while True:
            if self.announced is not None:
                length = self.announced.length
                if len(self.tail) < length:
                    return
                data, self.tail = self.tail[:length], self.tail[length:]
                self.events.append(DataChunk(self.announced.cookie, self.announced.offset, length, memoryview(data)))
                self.announced = None
            events, consumed = self.transmission.receive(memoryview(self.tail))
            self.tail = self.tail[consumed:]
            if not events or not isinstance(events[-1], DataChunk) or events[-1].data is not None:
                self.events += events
                return
            self.events += events[:-1]
            self.announced = events[-1]


def cut(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    """Cut data into pieces of the given sizes, and the rest."""
    position = 0
    for size in sizes:
        yield data[position : position + size]
        position += size
    yield data[position:]


# Talking to each other --------------------------------------------------------------------------------------

ASKED = st.tuples(
    st.sampled_from([command for command in Command if command is not Command.DISC]),
    st.integers(0, SIZE + BLOCK) | st.integers(0, SIZE // BLOCK).map(lambda block: block * BLOCK),
    st.integers(0, 3 * LARGE) | st.sampled_from([0, BLOCK, SIZE]),
    st.sampled_from([CommandFlag(0), CommandFlag.FUA, CommandFlag.DF, CommandFlag.REQ_ONE, CommandFlag.NO_HOLE]),
)
FLAG_OF = {
    CommandFlag.DF: Command.READ,
    CommandFlag.REQ_ONE: Command.BLOCK_STATUS,
    CommandFlag.NO_HOLE: Command.WRITE_ZEROES,
}


def expected_error(command: Command, offset: int, length: int, flags: CommandFlag) -> Errno:
    if flags in FLAG_OF and FLAG_OF[flags] is not command:
        return Errno.EINVAL
    if command in (Command.FLUSH, Command.RESIZE):
        return Errno.OK
    if offset + length > SIZE:
        return Errno.ENOSPC if command in (Command.WRITE, Command.WRITE_ZEROES) else Errno.EINVAL
    if command is Command.BLOCK_STATUS and not length:
        return Errno.EINVAL
    return Errno.OK


class Conversation:
    """One client, one server, and what every request must come to."""

    def __init__(self, mode: ReplyMode, seed: int) -> None:
        self.mode = mode
        self.client = MemoryClient(mode)
        self.server = MemoryServer(mode, seed)
        self.random = random.Random(seed)
        self.disk = bytearray(SIZE)
        self.errors: dict[int, Errno] = {}
        self.reads: dict[int, tuple[int, bytes]] = {}
        self.statuses: dict[int, tuple[int, int, bytes]] = {}
        self.sent = b""

    def ask(self, command: Command, offset: int, length: int, flags: CommandFlag) -> None:
        if self.mode is ReplyMode.SIMPLE and (command is Command.BLOCK_STATUS or flags is CommandFlag.DF):
            return
        error = expected_error(command, offset, length, flags)
        payload = self.random.randbytes(length) if command is Command.WRITE else None
        named = [DIRTY_BITMAP] if self.mode is ReplyMode.EXTENDED and command is Command.BLOCK_STATUS else None
        cookie, buffers = self.client.transmission.request(command, offset, length, flags, payload, named)
        self.sent += b"".join(buffers)
        self.errors[cookie] = error
        if error is not Errno.OK:
            return
        if command is Command.WRITE:
            self.disk[offset : offset + length] = payload or b""
        elif command in (Command.WRITE_ZEROES, Command.TRIM):
            self.disk[offset : offset + length] = bytes(length)
        elif command is Command.READ:
            self.reads[cookie] = (offset, bytes(self.disk[offset : offset + length]))
        elif command is Command.BLOCK_STATUS:
            self.statuses[cookie] = (offset, length, bytes(self.disk))

    def check(self) -> None:
        events = self.client.events
        assert self.client.transmission.outstanding == 0
        assert self.server.disk == self.disk
        done = {event.cookie: event.error for event in events if isinstance(event, Done)}
        assert done == self.errors
        told = {event.cookie for event in events if isinstance(event, ErrorChunk) and event.text}
        if self.mode is not ReplyMode.SIMPLE:
            assert told == {cookie for cookie, error in self.errors.items() if error}
        for cookie, (offset, data) in self.reads.items():
            found = bytearray(b"?" * len(data))
            for event in events:
                if isinstance(event, DataChunk | HoleChunk) and event.cookie == cookie:
                    content = event.data if isinstance(event, DataChunk) else bytes(event.length)
                    assert content is not None
                    found[event.offset - offset : event.offset - offset + event.length] = content
            assert found == data
        for event in events:
            if isinstance(event, StatusChunk):
                self.check_status(event)

    def check_status(self, event: StatusChunk) -> None:
        offset, length, disk = self.statuses[event.cookie]
        end = offset
        for extent, flags in event.extents:
            has_data = any(disk[end : end + extent])
            assert flags == (int(has_data) if event.context_id == DIRTY_BITMAP else 3 * (not has_data))
            end += extent
        assert offset < end <= offset + length


@pytest.mark.parametrize("mode", ReplyMode)
@given(
    asked=st.lists(ASKED, max_size=25),
    requests_cut=st.lists(st.integers(0, 3000), max_size=30),
    replies_cut=st.lists(st.integers(0, 3000), max_size=30),
    seed=st.integers(0, 2**32),
)
def test_both_ends_understand_each_other(
    mode: ReplyMode,
    asked: list[tuple[Command, int, int, CommandFlag]],
    requests_cut: list[int],
    replies_cut: list[int],
    seed: int,
) -> None:
    conversation = Conversation(mode, seed)
    for one in asked:
        conversation.ask(*one)
    for piece in cut(conversation.sent, requests_cut):
        conversation.server.receive(piece)
    for piece in cut(b"".join(conversation.server.send()), replies_cut):
        conversation.client.receive(piece)
    conversation.check()


EVERY_PATH = [
    (Command.WRITE, 100, 1000, CommandFlag.FUA),
    (Command.WRITE, 4096, LARGE + 1, CommandFlag(0)),
    (Command.WRITE, SIZE - 1, 2, CommandFlag(0)),
    (Command.WRITE, 0, 0, CommandFlag(0)),
    (Command.READ, 0, 3 * LARGE, CommandFlag(0)),
    (Command.READ, 0, 3 * LARGE, CommandFlag.DF),
    (Command.READ, 512, 8192, CommandFlag(0)),
    (Command.READ, 4000, 8192, CommandFlag(0)),
    (Command.READ, 0, SIZE, CommandFlag(0)),
    (Command.READ, SIZE, 1, CommandFlag(0)),
    (Command.READ, SIZE, 0, CommandFlag(0)),
    (Command.TRIM, 512, 512, CommandFlag(0)),
    (Command.CACHE, 0, SIZE, CommandFlag.FUA),
    (Command.WRITE_ZEROES, 4096, 1024, CommandFlag.NO_HOLE),
    (Command.FLUSH, 0, 0, CommandFlag(0)),
    (Command.BLOCK_STATUS, 0, SIZE, CommandFlag(0)),
    (Command.BLOCK_STATUS, 0, SIZE, CommandFlag.REQ_ONE),
    (Command.BLOCK_STATUS, 0, 0, CommandFlag(0)),
    (Command.RESIZE, 2 * SIZE, 0, CommandFlag(0)),
]


def every_path(mode: ReplyMode) -> Conversation:
    conversation = Conversation(mode, 1)
    for one in EVERY_PATH:
        conversation.ask(*one)
    return conversation


@pytest.mark.parametrize("mode", ReplyMode)
def test_every_command_in_every_framing(mode: ReplyMode) -> None:
    conversation = every_path(mode)
    conversation.server.receive(conversation.sent)
    conversation.client.receive(b"".join(conversation.server.send()))
    conversation.check()
    assert {request[0] for request in EVERY_PATH} == set(Command) - {Command.DISC}
    simple = {DataChunk, Done}
    chunked = {DataChunk, HoleChunk, StatusChunk, ErrorChunk, Done}
    kinds = {type(event) for event in conversation.client.events}
    assert kinds == (simple if mode is ReplyMode.SIMPLE else chunked)


# Cut at every byte ------------------------------------------------------------------------------------------


def sent_in_every_path(mode: ReplyMode) -> bytes:
    """Everything a server may be asked, with what it must refuse but survive, and the end."""
    sent: bytes = every_path(mode).sent
    layout = messages.EXTENDED_REQUEST if mode is ReplyMode.EXTENDED else messages.REQUEST
    flags = CommandFlag.PAYLOAD_LEN
    sent += layout.build({"flags": 0x8000, "type": 99, "cookie": 1, "offset": 2, "length": 3})
    if mode is ReplyMode.EXTENDED:
        sent += layout.build({"flags": flags, "type": 0, "cookie": 1, "offset": 2, "length": 30}) + bytes(30)
        sent += layout.build({"flags": flags, "type": 7, "cookie": 1, "offset": 2, "length": 13}) + bytes(13)
        sent += layout.build({"flags": 0, "type": 1, "cookie": 1, "offset": 2, "length": 13}) + bytes(13)
    sent += layout.build({"flags": 0, "type": 3, "cookie": 4, "offset": 0, "length": 0})
    sent += layout.build({"flags": 0, "type": 2, "cookie": 0, "offset": 0, "length": 0}) + b"never read"
    return sent


def requests_of(mode: ReplyMode, pieces: Iterable[bytes]) -> list[Request]:
    receiver = Receiver(ServerTransmission(mode, large_payload=LARGE))
    return [request for piece in pieces for request in receiver.feed(piece)]


@pytest.mark.parametrize("mode", ReplyMode)
def test_requests_are_the_same_wherever_they_are_cut(mode: ReplyMode) -> None:
    sent = sent_in_every_path(mode)
    expected = requests_of(mode, [sent])
    assert expected[-1].type == Command.DISC
    assert requests_of(mode, (sent[i : i + 1] for i in range(len(sent)))) == expected
    for i in range(len(sent)):
        assert requests_of(mode, (sent[:i], sent[i:])) == expected


@pytest.mark.parametrize("mode", ReplyMode)
def test_events_are_the_same_wherever_they_are_cut(mode: ReplyMode) -> None:
    conversation = every_path(mode)
    conversation.server.receive(conversation.sent)
    replies = b"".join(conversation.server.send())

    def events_of(pieces: Iterable[bytes]) -> list[Event]:
        client = every_path(mode).client
        for piece in pieces:
            client.receive(piece)
        return client.events

    expected = events_of([replies])
    assert len([event for event in expected if isinstance(event, Done)]) == len(conversation.errors)
    assert events_of(replies[i : i + 1] for i in range(len(replies))) == expected
    for i in range(0, len(replies), 7):
        assert events_of((replies[:i], replies[i:])) == expected


# Garbage ----------------------------------------------------------------------------------------------------

NUMBER64 = st.integers(0, 2**64 - 1) | st.integers(0, 5000)
NUMBER32 = st.integers(0, 2**32 - 1) | st.integers(0, 5000)
GARBAGE = st.binary(max_size=100)


def built(layout: Any, **fields: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.fixed_dictionaries(fields).map(layout.build)


FLAGS = st.integers(0, 63) | st.integers(0, 65535)
COMMANDS = st.integers(0, 10) | st.integers(0, 65535)
COMPACT = built(messages.REQUEST, flags=FLAGS, type=COMMANDS, cookie=NUMBER64, offset=NUMBER64, length=NUMBER32)
EXTENDED = built(
    messages.EXTENDED_REQUEST, flags=FLAGS, type=COMMANDS, cookie=NUMBER64, offset=NUMBER64, length=NUMBER64
)


@pytest.mark.parametrize("mode", ReplyMode)
@settings(max_examples=300)
@given(data=st.data())
def test_garbage_to_the_server_is_a_request_or_a_protocol_error(mode: ReplyMode, data: st.DataObject) -> None:
    receiver = Receiver(ServerTransmission(mode, large_payload=LARGE))
    rules = ExportRules(SIZE, ALL_FLAGS, mode=mode, context_ids=[BASE])
    requests = EXTENDED if mode is ReplyMode.EXTENDED else COMPACT
    for piece in data.draw(st.lists(requests | GARBAGE, max_size=20)):
        try:
            for request in receiver.feed(piece):
                refusal = rules.refusal(request)
                assert refusal is None or refusal[0] is not Errno.OK
                if request.type != Command.DISC and refusal is not None:
                    assert replies_for(mode).error(request, *refusal)
        except RemoteProtocolError:
            return
        if receiver.partial is not None:
            assert receiver.partial.length <= receiver.transmission.max_payload


COOKIES = st.integers(0, 12)
CHUNK_TYPES = st.sampled_from([*ChunkType, 0x8003]) | st.integers(0, 65535)
REQUEST_OFFSETS = st.integers(0, 3).map(lambda i: i * 512)
LENGTHS = st.integers(0, 40) | NUMBER32
PAYLOADS = (
    GARBAGE
    | built(messages.OFFSET_DATA, offset=st.integers(0, 2048))
    | built(messages.OFFSET_HOLE, offset=st.integers(0, 2048), length=st.integers(0, 1024))
    | built(messages.BLOCK_STATUS, context_id=st.sampled_from([BASE, DIRTY_BITMAP, 0]))
    | built(messages.BLOCK_STATUS_EXT, context_id=st.sampled_from([BASE, DIRTY_BITMAP, 0]), count=st.integers(0, 3))
    | built(messages.EXTENT, length=st.integers(0, 1024), flags=NUMBER32)
    | built(messages.EXTENT_EXT, length=NUMBER64, flags=NUMBER64)
    | st.builds(lambda text: messages.ERROR_CHUNK.build(messages.ErrorChunk(5, text)), st.text("abc", max_size=20))
)
CHUNKS = {
    ReplyMode.SIMPLE: built(messages.SIMPLE_REPLY, error=NUMBER32, cookie=COOKIES),
    ReplyMode.STRUCTURED: built(
        messages.STRUCTURED_CHUNK, flags=st.integers(0, 3), type=CHUNK_TYPES, cookie=COOKIES, length=LENGTHS
    )
    | built(messages.SIMPLE_REPLY, error=NUMBER32, cookie=COOKIES),
    ReplyMode.EXTENDED: built(
        messages.EXTENDED_CHUNK,
        flags=st.integers(0, 3),
        type=CHUNK_TYPES,
        cookie=COOKIES,
        offset=REQUEST_OFFSETS,
        length=LENGTHS | NUMBER64,
    ),
}


@pytest.mark.parametrize("mode", ReplyMode)
@settings(max_examples=300)
@given(data=st.data())
def test_garbage_to_the_client_is_an_event_or_a_protocol_error(mode: ReplyMode, data: st.DataObject) -> None:
    client = MemoryClient(mode)
    for command in (Command.READ, Command.READ, Command.FLUSH, Command.BLOCK_STATUS, Command.WRITE, Command.READ) * 2:
        if mode is not ReplyMode.SIMPLE or command is not Command.BLOCK_STATUS:
            payload = b"x" * 512 if command is Command.WRITE else None
            client.transmission.request(command, data.draw(REQUEST_OFFSETS), 1024, payload=payload)
    for piece in data.draw(st.lists(st.tuples(CHUNKS[mode], PAYLOADS) | st.tuples(GARBAGE, GARBAGE), max_size=20)):
        try:
            client.receive(b"".join(piece))
        except RemoteProtocolError:
            return
        assert len(client.tail) < LARGE + 100 or client.announced is not None
    assert client.transmission.outstanding <= 12


@pytest.mark.parametrize("mode", [ReplyMode.SIMPLE, ReplyMode.STRUCTURED])
def test_a_swallowed_payload_takes_no_memory(mode: ReplyMode) -> None:
    transmission = ServerTransmission(mode)
    header = messages.REQUEST.build({"flags": 0, "type": 1, "cookie": 1, "offset": 0, "length": 40 * MIB})
    zeroes = memoryview(bytes(64 * 1024))
    tracemalloc.start()
    try:
        assert transmission.parse(memoryview(header), 64).requests[0].refused is Errno.EINVAL
        for _ in range(40 * MIB // len(zeroes)):
            assert transmission.parse(zeroes, 64).consumed == len(zeroes)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    after = messages.REQUEST.build({"flags": 0, "type": 3, "cookie": 2, "offset": 0, "length": 0})
    assert transmission.parse(memoryview(after), 64).requests[0].cookie == 2


def test_a_long_block_status_takes_memory_only_as_it_arrives() -> None:
    client = ClientTransmission(ReplyMode.STRUCTURED, context_ids=[BASE])
    cookie, _ = client.request(Command.BLOCK_STATUS, 0, 1 << 30)
    length = 4 + 8 * (1 << 20)
    header = messages.STRUCTURED_CHUNK.build({"flags": 0, "type": 5, "cookie": cookie, "length": length})
    tracemalloc.start()
    try:
        assert client.receive(memoryview(header + bytes(100))) == ([], len(header) + 100)
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()

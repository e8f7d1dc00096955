"""libnbd against `pynbd serve`, command by command, as nbdsh does it: negotiation by hand, odd requests, refusals.

The scripts run in nbdsh itself, with `h` a handle, `nbd` the module and `uri(NAME)` for an export's address. An
assertion that fails there fails the test, with what nbdsh printed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.interop.framing import FRAMINGS, framing_options
from tests.peers import Peer, pynbd_serve, require_nbdsh, run

SIZE_BYTES = 64 << 20

PRELUDE = '''
import os
K, M = 1 << 10, 1 << 20
SIZE = 64 * M
UNSTRICT = 0

def uri(name):
    return os.environ["URI"].replace("NAME", name)

def refused(errno, call, *arguments, **named):
    """The call must fail with this errno of the server."""
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        assert error.errno == errno, f"{error.errno} instead of {errno}: {error.string}"
        return
    raise AssertionError(f"not refused with {errno}: {call.__name__}{arguments}")

def chunks(length, offset, flags=0):
    """(kind, offset, length) of each chunk of a structured read, and the data."""
    found = []
    names = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole", nbd.READ_ERROR: "error"}
    def take(chunk, at, status, error):
        found.append((names[status], at, len(chunk)))
    return found, h.pread_structured(length, offset, take, flags)

def status(length, offset, flags=0):
    """{context: [length, flags, length, flags...]} of one block status request."""
    found = {}
    h.block_status(length, offset, lambda context, at, entries, error: found.update({context: entries}), flags)
    return found
'''


def nbdsh(peer: Peer, script: str, *, connect: str | None = "disk", first: str = "") -> str:
    """Run a script in nbdsh, connected to an export already unless `connect` is None; `first` comes before it."""
    connected = f"h.connect_uri(uri({connect!r}))\n" if connect is not None else ""
    code = PRELUDE + connected + first + textwrap.dedent(script)
    return run(*require_nbdsh(), "-c", code, env={"URI": peer.uri("NAME")})


def simple_or_structured(framing: str) -> str:
    """The first line of a script for libnbd, which knows no extended headers: what it will have negotiated."""
    return f"assert h.get_structured_replies_negotiated() is {framing != 'simple'}\n"


@pytest.fixture
def disk(make_disk: object, tmp_path: Path) -> Path:
    """1 MiB of 0xff, a hole, 64 KiB of 0xff at 32 MiB, a hole."""
    path = tmp_path / "disk.raw"
    with path.open("wb") as file:
        file.truncate(SIZE_BYTES)
        file.write(b"\xff" * (1 << 20))
        file.seek(32 << 20)
        file.write(b"\xff" * (64 << 10))
    return path


@pytest.fixture
def peer(disk: Path) -> Iterator[Peer]:
    options = ["-f", "raw", "-A", "-B", "since", "-D", "a disk", "-x", "disk", "--discard=unmap"]
    with pynbd_serve(*options, disk) as peer:
        yield peer


@pytest.fixture(params=FRAMINGS)
def framed(request: pytest.FixtureRequest, tmp_path: Path, disk: Path) -> Iterator[tuple[Peer, str]]:
    """A server in each framing, and the line that asserts what libnbd has negotiated with it."""
    options = [*framing_options(request.param, tmp_path), "-f", "raw", "-x", "disk", "--discard=unmap"]
    with pynbd_serve(*options, disk) as peer:
        yield peer, simple_or_structured(request.param)


# Option mode ------------------------------------------------------------------------------------------------


def test_option_mode_lists_asks_and_goes(peer: Peer) -> None:
    """LIST, INFO of several names, and GO on one connection; an unknown name leaves it usable."""
    nbdsh(
        peer,
        """
        h.set_opt_mode(True)
        h.set_full_info(True)
        h.connect_uri(uri("disk"))
        listed = []
        assert h.opt_list(lambda name, description: listed.append((name, description))) == 1
        assert listed == [("disk", "a disk")]
        h.opt_info()
        told = (h.get_size(), h.get_canonical_export_name(), h.get_export_description(), h.can_multi_conn())
        assert told == (SIZE, "disk", "a disk", True), told
        h.set_export_name("another")
        refused("ENOENT", h.opt_info)
        refused("ENOENT", h.opt_go)
        h.set_export_name("x" * 4096)
        refused("ENOENT", h.opt_info)
        h.set_export_name("disk")
        h.opt_go()
        assert (h.get_size(), h.get_export_description()) == (SIZE, "a disk")
        assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
        assert h.pread(4, M - 2) == b"\\xff\\xff\\0\\0"
        h.shutdown()
        """,
        connect=None,
    )


def test_option_mode_aborts(peer: Peer) -> None:
    nbdsh(
        peer,
        """
        h.set_opt_mode(True)
        h.connect_uri(uri("disk"))
        h.opt_abort()
        assert h.aio_is_closed()
        """,
        connect=None,
    )


def test_option_mode_lists_meta_contexts(peer: Peer) -> None:
    """All of them, those of a namespace, and one by name; unknown ones select nothing."""
    nbdsh(
        peer,
        """
        h.set_opt_mode(True)
        h.connect_uri(uri("disk"))
        def contexts(*queries):
            h.clear_meta_contexts()
            for query in queries:
                h.add_meta_context(query)
            found = []
            h.opt_list_meta_context(found.append)
            return found
        everything = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:since"]
        assert contexts() == everything
        assert contexts("base:") == everything[:1]
        assert contexts("qemu:") == everything[1:]
        assert contexts("qemu:dirty-bitmap:") == everything[2:]
        assert contexts("qemu:dirty-bitmap:since", "x-other:thing") == everything[2:]
        assert contexts("base:no-such") == []
        h.clear_meta_contexts()
        h.add_meta_context("qemu:dirty-bitmap:since")
        h.add_meta_context("qemu:dirty-bitmap:no-such")
        h.opt_go()
        assert h.can_meta_context("qemu:dirty-bitmap:since") is True
        assert h.can_meta_context("qemu:dirty-bitmap:no-such") is False
        assert h.can_meta_context("base:allocation") is False
        """,
        connect=None,
    )


def test_without_structured_replies_and_without_fixed_newstyle(peer: Peer) -> None:
    """A client that asks for nothing gets simple replies; one with no handshake flags uses EXPORT_NAME."""
    nbdsh(
        peer,
        """
        for flags in (nbd.HANDSHAKE_FLAG_MASK, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_NO_ZEROES, 0):
            h = nbd.NBD()
            h.set_request_structured_replies(False)
            h.set_handshake_flags(flags)
            h.connect_uri(uri("disk"))
            assert h.get_size() == SIZE
            assert h.get_structured_replies_negotiated() is False
            assert h.can_df() is False
            assert h.pread(4, M - 2) == b"\\xff\\xff\\0\\0"
            h.shutdown()
        h = nbd.NBD()
        h.set_handshake_flags(0)
        try:
            h.connect_uri(uri("another"))
        except nbd.Error:
            pass
        else:
            raise AssertionError("an unknown name was taken")
        """,
        connect=None,
    )


def test_a_client_that_asks_for_no_block_sizes(peer: Peer) -> None:
    """A client that does not ask for block sizes is served with a minimum of one byte."""
    nbdsh(
        peer,
        """
        h.set_request_block_size(False)
        h.connect_uri(uri("disk"))
        h.pwrite(b"odd", 12345)
        assert h.pread(5, 12344) == b"\\xffodd\\xff"
        """,
        connect=None,
    )


# Commands ---------------------------------------------------------------------------------------------------


def test_every_command(framed: tuple[Peer, str]) -> None:
    """Read, write, trim, zero, cache and flush, with FUA where it may stand."""
    peer, negotiated = framed
    nbdsh(
        peer,
        """
        h.pwrite(b"a" * 3000, 1001)
        h.pwrite(b"b" * 512, 8192, nbd.CMD_FLAG_FUA)
        assert h.pread(3002, 1000) == b"\\xff" + b"a" * 3000 + b"\\xff"
        assert h.pread(512, 8192) == b"b" * 512
        h.zero(4096, 8192)
        h.zero(4096, 16384, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
        assert h.pread(4096, 8192) == h.pread(4096, 16384) == bytes(4096)
        h.trim(64 * K, 64 * K)
        h.trim(64 * K, 128 * K, nbd.CMD_FLAG_FUA)
        h.cache(M, 0)
        h.flush()
        big = bytes(range(256)) * (32 * M // 256)
        h.pwrite(big, 3)
        assert h.pread(len(big), 3) == big
        """,
        first=negotiated,
    )


def test_zero_lengths(framed: tuple[Peer, str]) -> None:
    """A length of zero does nothing, at any offset up to the end, and never costs the connection."""
    peer, negotiated = framed
    nbdsh(
        peer,
        """
        h.set_strict_mode(UNSTRICT)
        for offset in (0, 513, SIZE):
            for call in (lambda: h.pread(0, offset), lambda: h.pwrite(b"", offset), lambda: h.trim(0, offset),
                         lambda: h.zero(0, offset), lambda: h.cache(0, offset)):
                try:
                    call()
                except nbd.Error as error:
                    assert error.errno in ("EINVAL", "ENOSPC"), error
        assert h.pread(2, M - 1) == b"\\xff\\0"
        """,
        first=negotiated,
    )


def test_requests_past_the_end(framed: tuple[Peer, str]) -> None:
    """Reading there is EINVAL, writing ENOSPC, and nothing of it is done; offsets near 2^64 don't wrap around."""
    peer, negotiated = framed
    nbdsh(
        peer,
        """
        h.set_strict_mode(UNSTRICT)
        for offset, length in ((SIZE, 1), (SIZE - 1, 2), (SIZE + 512, 512), (2**63 - 512, 512), (0, SIZE + 1)):
            if length <= 32 * M:
                refused("EINVAL", h.pread, length, offset)
                refused("ENOSPC", h.pwrite, b"x" * length, offset)
            refused("EINVAL", h.trim, length, offset)
            refused("EINVAL", h.cache, length, offset)
            refused("ENOSPC", h.zero, length, offset)
        for offset in (2**64 - 512, 2**64 - 1, 2**63):
            refused("EINVAL", h.pread, 1024, offset)
            refused("ENOSPC", h.pwrite, b"x" * 1024, offset)
            refused("ENOSPC", h.zero, 1024, offset)
        assert h.pread(1, SIZE - 1) == b"\\0"
        assert h.pread(1, 0) == b"\\xff"
        """,
        first=negotiated,
    )


def test_unknown_flags(framed: tuple[Peer, str]) -> None:
    """A flag that the command does not have is EINVAL, and a refused write takes its payload along."""
    peer, negotiated = framed
    nbdsh(
        peer,
        """
        h.set_strict_mode(UNSTRICT)
        for flag in (1 << 6, 1 << 9, 1 << 15, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO):
            refused("EINVAL", h.pwrite, b"x" * 100_000, 0, flag)
            refused("EINVAL", h.pread, 512, 0, flag)
            refused("EINVAL", h.flush, flag)
            refused("EINVAL", h.trim, 512, 0, flag)
        for flag in (1 << 6, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_DF):
            refused("EINVAL", h.zero, 512, 0, flag)
        assert h.pread(512, 0) == b"\\xff" * 512
        h.flush(nbd.CMD_FLAG_FUA)
        assert h.pread(512, 0, nbd.CMD_FLAG_FUA) == b"\\xff" * 512
        """,
        first=negotiated,
    )


def test_reads_beyond_the_largest_payload_are_refused(peer: Peer) -> None:
    """Lengths far beyond the advertised maximum are answered, and the connection lives."""
    nbdsh(
        peer,
        """
        h.set_strict_mode(UNSTRICT)
        refused("EINVAL", h.pread, 33 * M, 0)
        refused("EINVAL", h.pread, 63 * M, 0)
        assert h.pread(512, 0) == b"\\xff" * 512
        h.zero(SIZE, 0)
        h.trim(SIZE, 0)
        assert h.pread(512, 0) == bytes(512)
        """,
    )


def test_misaligned_where_blocks_are_large(disk: Path, tmp_path: Path) -> None:
    """With a minimum block of 4096 everything else is EINVAL, told by name before."""
    config = tmp_path / "blocks.toml"
    config.write_text(f'[export.disk]\ndisk = "{disk}"\nformat = "raw"\nmin-block = 4096\n')
    with pynbd_serve("--config", config) as peer:
        nbdsh(
            peer,
            """
            assert h.get_block_size(nbd.SIZE_MINIMUM) == 4096
            h.set_strict_mode(UNSTRICT)
            for offset, length in ((1, 4096), (512, 4096), (0, 512), (4096, 4097)):
                refused("EINVAL", h.pread, length, offset)
                refused("EINVAL", h.pwrite, b"x" * length, offset)
                refused("EINVAL", h.zero, length, offset)
                refused("EINVAL", h.trim, length, offset)
            h.pwrite(b"x" * 4096, 4096)
            assert h.pread(8192, 4096) == b"x" * 4096 + b"\\xff" * 4096
            """,
        )


def test_a_read_only_export_refuses(disk: Path) -> None:
    """EPERM for whatever would change it, and it is as it was."""
    before = disk.read_bytes()
    with pynbd_serve("-r", "-f", "raw", "-x", "disk", disk) as peer:
        nbdsh(
            peer,
            """
            assert h.is_read_only() is True
            h.set_strict_mode(UNSTRICT)
            refused("EPERM", h.pwrite, b"x" * 100_000, 0)
            refused("EPERM", h.zero, 512, 0)
            refused("EPERM", h.trim, 512, 0)
            assert h.pread(512, 0) == b"\\xff" * 512
            h.flush()
            """,
        )
    assert disk.read_bytes() == before


def test_many_requests_in_any_order(peer: Peer) -> None:
    """400 commands in flight on one connection, each with its own answer."""
    nbdsh(
        peer,
        """
        cookies, buffers = [], []
        for number in range(200):
            data = nbd.Buffer.from_bytearray(bytearray([number % 251 + 1]) * 4096)
            cookies.append(h.aio_pwrite(data, number * 8192))
        while cookies:
            h.poll(-1)
            cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
        for number in range(200):
            buffers.append((nbd.Buffer(4096), number))
            cookies.append(h.aio_pread(buffers[-1][0], number * 8192))
            cookies.append(h.aio_cache(4096, number * 8192))
        while cookies:
            h.poll(-1)
            cookies = [cookie for cookie in cookies if not h.aio_command_completed(cookie)]
        for buffer, number in buffers:
            assert buffer.to_bytearray() == bytes([number % 251 + 1]) * 4096, number
        """,
    )


def test_disconnect_with_requests_in_flight(peer: Peer, disk: Path) -> None:
    """What was asked for before DISC is done before the connection closes."""
    nbdsh(
        peer,
        """
        for number in range(32):
            data = nbd.Buffer.from_bytearray(bytearray(b"d") * (256 * K))
            h.aio_pwrite(data, number * M)
        h.shutdown()
        """,
    )
    with disk.open("rb") as file:
        for number in range(32):
            file.seek(number << 20)
            assert file.read(256 << 10) == b"d" * (256 << 10)


# Structured reads and block status --------------------------------------------------------------------------


def test_structured_reads_tell_holes(peer: Peer) -> None:
    """Data where there is data, holes where there are holes, each byte once, in one piece with DF."""
    nbdsh(
        peer,
        """
        found, data = chunks(4 * M, 0)
        assert data == b"\\xff" * M + bytes(3 * M)
        assert sum(length for _, _, length in found) == 4 * M
        assert sum(length for kind, _, length in found if kind == "hole") == 3 * M, found
        found, data = chunks(128 * K, 3 * M)
        assert found == [("hole", 3 * M, 128 * K)], found
        assert data == bytes(128 * K)
        found, data = chunks(64 * K, M - 32 * K, nbd.CMD_FLAG_DF)
        assert found == [("data", M - 32 * K, 64 * K)]
        assert data == b"\\xff" * (32 * K) + bytes(32 * K)
        found, data = chunks(2 * M, 0, nbd.CMD_FLAG_DF)
        assert len(found) == 1
        found, data = chunks(1, M - 1)
        assert found == [("data", M - 1, 1)]
        found, data = chunks(100_000, 32 * M + 60 * K)
        assert data == b"\\xff" * (4 * K) + bytes(100_000 - 4 * K)
        """,
    )


def test_block_status_of_every_context(peer: Peer) -> None:
    """Several contexts in one request, each with extents of its own."""
    nbdsh(
        peer,
        """
        for context in ("base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:since"):
            h.add_meta_context(context)
        h.connect_uri(uri("disk"))
        h.pwrite(b"x" * 64 * K, 0)
        found = status(SIZE, 0)
        assert found["base:allocation"] == [M, 0, 31 * M, 3, 64 * K, 0, 32 * M - 64 * K, 3], found
        assert found["qemu:allocation-depth"] == [SIZE, 1], found
        assert found["qemu:dirty-bitmap:since"] == [64 * K, 1, SIZE - 64 * K, 0], found
        """,
        connect=None,
    )


def test_block_status_of_one_extent_and_of_odd_ranges(peer: Peer) -> None:
    """REQ_ONE: a single extent inside the request; other ranges start in the middle and end anywhere."""
    nbdsh(
        peer,
        """
        h.add_meta_context("base:allocation")
        h.connect_uri(uri("disk"))
        def one(length, offset):
            return status(length, offset, nbd.CMD_FLAG_REQ_ONE)["base:allocation"]
        assert one(SIZE, 0) == [M, 0]
        assert one(512 * K, 0) == [512 * K, 0]
        assert one(1, M) == [1, 3]
        assert one(32 * M, M) == [31 * M, 3]
        entries = status(2 * M, M - 4096)["base:allocation"]
        assert entries[:2] == [4096, 0] and entries[3] == 3 and entries[2] >= 1
        h.set_strict_mode(UNSTRICT)
        refused("EINVAL", status, SIZE + 1, 0)
        refused("EINVAL", status, 512, SIZE)
        refused("EINVAL", status, 512, 0, nbd.CMD_FLAG_DF)
        try:
            status(0, 0)
        except nbd.Error as error:
            assert error.errno == "EINVAL", error
        assert one(1, 0) == [1, 0]
        """,
        connect=None,
    )


def test_block_status_without_a_context_is_refused(peer: Peer) -> None:
    nbdsh(
        peer,
        """
        h.set_strict_mode(UNSTRICT)
        try:
            status(512, 0)
        except nbd.Error as error:
            assert error.errno in ("EINVAL", "ENOTSUP"), error
        else:
            raise AssertionError("answered")
        assert h.pread(1, 0) == b"\\xff"
        """,
    )


def test_block_status_of_the_longest_range() -> None:
    """0xffffffff bytes of a disk of 1 TiB: one extent, as long as was asked or longer."""
    with pynbd_serve("-x", "disk", "driver=memory,size=1T") as peer:
        nbdsh(
            peer,
            """
            h.add_meta_context("base:allocation")
            h.connect_uri(uri("disk"))
            for offset in (0, 1, 2**40 - 2**32, 2**40 - 0xffffffff):
                length, state = status(0xffffffff, offset)["base:allocation"]
                assert length and state == 3
            length, state = status(0xffffffff, 7, nbd.CMD_FLAG_REQ_ONE)["base:allocation"]
            assert 0 < length <= 0xffffffff
            h.zero(0xffffffff, 4096)
            h.trim(0xffffffff, 4096)
            h.pwrite(b"end", 2**40 - 3)
            assert h.pread(4, 2**40 - 4) == b"\\0end"
            """,
            connect=None,
        )


def test_a_fast_zero_is_done_or_refused(peer: Peer) -> None:
    """Refused, with ENOTSUP, it has changed nothing."""
    nbdsh(
        peer,
        """
        for flags in (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA):
            h.pwrite(b"z" * M, 0)
            try:
                h.zero(M, 0, nbd.CMD_FLAG_FAST_ZERO | flags)
            except nbd.Error as error:
                assert error.errno == "ENOTSUP", error
                assert h.pread(M, 0) == b"z" * M
            else:
                assert h.pread(M, 0) == bytes(M)
        """,
    )

"""A configuration brought to life: opened whole or not at all, served as it says, and ended in order."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest

from pynbd import Driver, RequestFlag
from pynbd.block import registry
from pynbd.block.backend import BlockBackend
from pynbd.block.errors import BlockError, OptionError
from pynbd.server import service as service_module
from pynbd.server.config import Config, ExportOptions, ListenOptions
from pynbd.server.server import NbdServer
from pynbd.server.service import Service, open_service

SIZE_BYTES = 1 << 20


class Recorder(Driver):
    """A disk that notes what is done to it, and fails where it is told to."""

    name = "recorder"
    size = SIZE_BYTES
    write_flags = int(RequestFlag.FUA)
    done: ClassVar[list[str]] = []
    fails: ClassVar[set[str]] = set()

    def note(self, what: str) -> None:
        """Note it, or fail."""
        self.done.append(what)
        if what in self.fails:
            raise OSError(errno.EIO, f"{self.node.name}: {what} failed as it was told")

    async def open(self) -> None:
        self.note("open")

    async def close(self) -> None:
        self.note("close")

    async def read(self, offset: int, into: memoryview, flags: int) -> None:
        self.note("read")
        into[:] = bytes(len(into))

    async def write(self, offset: int, data: memoryview, flags: int) -> None:
        self.note("write FUA" if flags & RequestFlag.FUA else "write")

    async def flush_to_disk(self) -> None:
        self.note("flush")


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """The recording driver, to be named `recorder`."""
    monkeypatch.setattr(Recorder, "done", [])
    monkeypatch.setattr(Recorder, "fails", set())
    known = registry.driver_class

    def driver_class(name: str, *, trusted: bool = True) -> type[Driver]:
        return Recorder if name == "recorder" else known(name, trusted=trusted)

    monkeypatch.setattr(registry, "driver_class", driver_class)
    return Recorder


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, for sockets."""
    with TemporaryDirectory(prefix="pynbd-") as folder:
        yield Path(folder)


@pytest.fixture
def services(monkeypatch: pytest.MonkeyPatch) -> list[Service]:
    """All services that are made, also those that come to nothing."""
    made: list[Service] = []

    class Seen(Service):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(service_module, "Service", Seen)
    return made


def exports(**wanted: str | dict[str, Any] | ExportOptions) -> dict[str, ExportOptions]:
    """Exports by name."""
    return {
        name: entry if isinstance(entry, ExportOptions) else ExportOptions(disk=entry) for name, entry in wanted.items()
    }


def backend_of(service: Service, name: str) -> BlockBackend:
    """The backend of an export."""
    return service.server.exports[name].backend


async def refused(config: Config) -> str:
    """What is said when a service can't be opened."""
    with pytest.raises((OSError, BlockError)) as problem:
        async with open_service(config):
            pytest.fail("it was opened")
    return str(problem.value)


# --- whole or not at all --------------------------------------------------------------------------------------


async def test_nothing_stays_open_if_one_disk_can_not_be(place: Path, services: list[Service]) -> None:
    listen = ListenOptions(listen=(f"unix:{place}/s",))
    nodes = ({"node-name": "n", "driver": "recorder"},)
    wanted = exports(a="n", b={"driver": "recorder"}, c=str(place / "missing"), d={"driver": "recorder"})
    assert "missing" in await refused(Config(server=listen, nodes=nodes, exports=wanted))
    assert sorted(Recorder.done) == ["close", "close", "flush", "flush", "open", "open"]
    assert services[0].graph.nodes == {}
    assert list(place.iterdir()) == []


async def test_what_lies_below_a_node_that_fails_is_closed_too(services: list[Service], place: Path) -> None:
    wanted = ExportOptions(disk={"driver": "recorder"}, filters=("nofilter", f"blkdebug,config={place}/missing"))
    assert f"{place}/missing" in await refused(Config(exports=exports(a=wanted)))
    assert Recorder.done == ["open", "flush", "close"]
    assert services[0].graph.nodes == {}


async def test_nothing_stays_open_if_it_can_not_listen(place: Path, services: list[Service]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        listen = ListenOptions(listen=(f"unix:{place}/s", f"127.0.0.1:{port}"))
        said = await refused(Config(server=listen, exports=exports(a={"driver": "recorder"})))
    assert said.endswith(f"can't listen on 127.0.0.1:{port}: Address already in use")
    assert list(place.iterdir()) == []
    assert services[0].graph.nodes == {}
    assert Recorder.done == ["open", "flush", "close"]


async def test_a_host_that_is_not_known_is_named() -> None:
    listen = ListenOptions(listen=("no-such-host.invalid:1",))
    assert "can't listen on no-such-host.invalid:1: " in await refused(
        Config(server=listen, exports=exports(a={"driver": "null"}))
    )


async def test_what_is_wrong_is_found_before_anything_is_opened() -> None:
    said = await refused(Config(exports=exports(a={"driver": "recorder"}, b={"driver": "raw", "fille": "x"})))
    assert said.startswith("export.b.disk: ")
    assert Recorder.done == []


async def test_two_writers_of_one_node_are_told_of_each_other() -> None:
    nodes = ({"node-name": "n", "driver": "recorder"},)
    said = await refused(Config(nodes=nodes, exports=exports(a="n", b="n")))
    assert "export 'a'" in said
    assert "export 'b'" in said


async def test_readers_may_share_a_node() -> None:
    """But not with a writer: it would write behind their backs."""
    nodes = ({"node-name": "n", "driver": "recorder"},)
    reader = ExportOptions(disk="n", read_only=True)
    async with open_service(Config(nodes=nodes, exports=exports(a=reader, b=reader))) as service:
        assert [service.server.exports[name].read_only for name in "ab"] == [True, True]
    assert "export 'b'" in await refused(Config(nodes=nodes, exports=exports(a="n", b=reader)))


# --- as it says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "written", "flushed"),
    [
        ("writeback", ["write"], ["flush"]),
        ("none", ["write"], ["flush"]),
        ("writethrough", ["write FUA"], ["flush"]),
        ("directsync", ["write FUA"], ["flush"]),
        ("unsafe", ["write"], []),
    ],
)
async def test_cache_modes(cache: Any, written: list[str], flushed: list[str]) -> None:
    wanted = ExportOptions(disk={"driver": "recorder"}, cache=cache)
    async with open_service(Config(exports=exports(a=wanted))) as service:
        backend = backend_of(service, "a")
        Recorder.done.clear()
        await backend.write(0, memoryview(b"x" * 512))
        assert Recorder.done == written
        await backend.flush()
        assert Recorder.done == written + flushed
        cache_options = backend.node.driver.options.cache
        assert cache_options.direct == (cache in ("none", "directsync"))
        assert cache_options.no_flush == (cache == "unsafe")


async def test_filters_lie_in_the_order_given() -> None:
    wanted = ExportOptions(disk={"driver": "recorder"}, filters=("nofilter", {"driver": "delay", "node-name": "top"}))
    async with open_service(Config(exports=exports(a=wanted))) as service:
        node = backend_of(service, "a").node
        names = [node.name]
        kinds = []
        while True:
            kinds.append(node.driver.name)
            if "file" not in node.children:
                break
            node = node.children["file"].node
    assert names == ["top"]
    assert kinds == ["delay", "nofilter", "recorder"]


async def test_an_overlay_on_a_node_leaves_it_alone() -> None:
    nodes = (
        {"node-name": "base", "driver": "recorder", "read-only": True},
        {"node-name": "over", "driver": "overlay", "backing": "base", "file": {"driver": "memory", "size": 0}},
    )
    async with open_service(Config(nodes=nodes, exports=exports(a="over"))) as service:
        await backend_of(service, "a").write(0, memoryview(b"x" * 4096))
        assert bytes(await read(backend_of(service, "a"), 0, 2)) == b"xx"
    assert not any(what.startswith("write") for what in Recorder.done)


async def read(backend: BlockBackend, offset: int, length: int) -> bytes:
    """What lies there."""
    into = bytearray(length)
    await backend.read(offset, memoryview(into))
    return bytes(into)


async def test_a_snapshot_leaves_the_disk_and_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, random_disk: Path
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    before = random_disk.read_bytes()
    wanted = ExportOptions(disk=str(random_disk), format="raw", snapshot=True)
    async with open_service(Config(exports=exports(a=wanted))) as service:
        backend = backend_of(service, "a")
        assert list(folder.iterdir()) == []
        await backend.write(100, memoryview(b"x" * 1000))
        assert await read(backend, 99, 1002) == before[99:100] + b"x" * 1000 + before[1100:1101]
    assert random_disk.read_bytes() == before
    assert list(folder.iterdir()) == []


async def test_bitmaps_are_made_and_note_writes() -> None:
    wanted = ExportOptions(disk={"driver": "recorder"}, bitmaps=("one", "two"), allocation_depth=True)
    async with open_service(Config(exports=exports(a=wanted))) as service:
        export = service.server.exports["a"]
        names = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:one", "qemu:dirty-bitmap:two"]
        assert export.contexts() == names
        await export.backend.write(65536, memoryview(b"x"))
        found = await export.context_extents("qemu:dirty-bitmap:two", 0, SIZE_BYTES, one=False)
    assert found == [(65536, 0), (65536, 1), (SIZE_BYTES - 131072, 0)]


async def test_exports_of_one_node_have_its_bitmaps_in_common() -> None:
    nodes = ({"node-name": "n", "driver": "recorder"},)
    wanted = ExportOptions(disk="n", read_only=True, bitmaps=("x",))
    async with open_service(Config(nodes=nodes, exports=exports(a=wanted, b=wanted))) as service:
        (bitmap,) = service.graph.nodes["n"].bitmaps.values()
        bitmap.mark(0, 1)
        for export in service.server.exports.values():
            found = await export.context_extents("qemu:dirty-bitmap:x", 0, SIZE_BYTES, one=False)
            assert found == [(65536, 1), (SIZE_BYTES - 65536, 0)]


async def test_block_sizes_and_resize_are_passed_on() -> None:
    wanted = ExportOptions(disk={"driver": "memory", "size": SIZE_BYTES}, min_block=4096, resize=True, description="d")
    async with open_service(Config(exports=exports(a=wanted))) as service:
        export = service.server.exports["a"]
        assert (export.info().min_block, export.info().description, export.resize) == (4096, "d", True)


async def test_an_offset(random_disk: Path) -> None:
    wanted = ExportOptions(disk=str(random_disk), offset=4096, read_only=True)
    async with open_service(Config(exports=exports(a=wanted))) as service:
        backend = backend_of(service, "a")
        assert backend.size == random_disk.stat().st_size - 4096
        assert await read(backend, 0, 512) == random_disk.read_bytes()[4096:4608]


async def test_uris_say_how_this_machine_reaches_it(place: Path) -> None:
    listen = ListenOptions(listen=("0.0.0.0:0", "[::1]:0", f"unix:{place}/s"))
    async with open_service(Config(server=listen, exports=exports(a={"driver": "null"}))) as service:
        v4, v6, unix = map(str, service.uris)
    assert v4.startswith("nbd://127.0.0.1:")
    assert v6.startswith("nbd://[::1]:")
    assert unix == f"nbd+unix:///?socket={place}/s"


async def test_a_unix_socket_appears_when_all_others_listen(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts wait for it, and go on with whatever address they want."""
    order: list[str] = []
    listen_tcp, listen_unix = NbdServer.listen_tcp, NbdServer.listen_unix

    async def tcp(self: NbdServer, host: str, port: int) -> list[tuple[str, int]]:
        bound = await listen_tcp(self, host, port)
        order.append("tcp")
        return bound

    def unix(self: NbdServer, path: str) -> None:
        order.append("unix")
        listen_unix(self, path)

    monkeypatch.setattr(NbdServer, "listen_tcp", tcp)
    monkeypatch.setattr(NbdServer, "listen_unix", unix)
    listen = ListenOptions(listen=(f"unix:{place}/s", "127.0.0.1:0", f"unix:{place}/t"))
    async with open_service(Config(server=listen, exports=exports(a={"driver": "null"}))) as service:
        assert order == ["tcp", "unix", "unix"]
        assert [uri.is_unix for uri in service.uris] == [True, False, True], "as they were given"


# --- the end --------------------------------------------------------------------------------------------------


async def test_everything_is_flushed_and_closed() -> None:
    async with open_service(Config(exports=exports(a={"driver": "recorder"}, b={"driver": "recorder"}))) as service:
        await backend_of(service, "a").write(0, memoryview(b"x"))
        Recorder.done.clear()
    assert Recorder.done == ["flush", "close"] * 2
    assert service.graph.nodes == {}


async def test_a_flush_that_fails_at_the_end_is_told_and_all_is_closed(place: Path) -> None:
    listen = ListenOptions(listen=(f"unix:{place}/s",))
    config = Config(server=listen, exports=exports(a={"driver": "recorder"}, b={"driver": "recorder"}))
    opened = open_service(config)
    service = await opened.__aenter__()
    await backend_of(service, "a").write(0, memoryview(b"x"))
    Recorder.fails.add("flush")
    Recorder.done.clear()
    with pytest.raises(OSError, match="flush failed as it was told") as problem:
        await opened.__aexit__(None, None, None)
    assert problem.value.errno == errno.EIO
    assert Recorder.done.count("close") == 2
    assert service.graph.nodes == {}
    assert list(place.iterdir()) == []


async def test_an_export_of_a_name_that_is_taken_leaves_nothing(services: list[Service]) -> None:
    async with open_service(Config(exports=exports(a={"driver": "null"}))) as service:
        nodes = set(service.graph.nodes)
        with pytest.raises(OptionError, match="two exports named 'a'"):
            await service.add_export("a", ExportOptions(disk={"driver": "recorder"}, filters=("nofilter",)))
        assert set(service.graph.nodes) == nodes
    assert Recorder.done == ["open", "flush", "close"]

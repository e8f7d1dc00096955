"""What is done to a server in one measurement, and what that gives."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from tests.benchmarks import process
from tests.benchmarks.disks import Disks, cool
from tests.peers import SYSTEM_PATH, Peer, run

WRITE_AREA_BYTES = 128 << 20
"""Writes stay in this much of a disk: what they leave in the page cache has to be written out before the next cell."""

COLD_FROM_BYTES = 64 << 20
"""Where the part of the disk begins that is dropped from the page cache, for the cell that reads such data."""

PROBE_REQUESTS = 128
"""So many requests tell how many qemu-img bench can do in the time it is given; it counts requests, not seconds."""

LAST_REQUEST = 1_000_000
"""The most requests that qemu-img bench is ever given."""


@dataclass(frozen=True)
class Place:
    """Where a load runs: the server, the disks, how long, on which processors the client."""

    peer: Peer
    disks: Disks
    size_bytes: int
    seconds: float
    client_cpus: str = ""

    def client(self, *command: str, timeout_s: float = 60.0) -> str:
        """Run a client program, confined to the processors meant for it."""
        pinned = ["taskset", "--cpu-list", self.client_cpus] if self.client_cpus else []
        return run(*pinned, *command, timeout_s=timeout_s)


@dataclass(frozen=True)
class Sample:
    """What one measurement gave. `value` is what contenders are compared by; None stands for what can't be had."""

    value: float
    requests: int | None = None
    transferred_bytes: int | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    cpu_s: float | None = None
    peak_resident_bytes: int | None = None
    notes: tuple[str, ...] = ()


class Load(Protocol):
    """One kind of measurement."""

    @property
    def unit(self) -> str:
        """What `Sample.value` is counted in."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more of it is good."""

    def measure(self, place: Place) -> Sample:
        """Load the server and tell what came of it. Raises CommandError when a client fails."""


@dataclass(frozen=True)
class Fio:
    """fio's nbd engine, over one connection or several."""

    rw: str
    block_bytes: int
    depth: int
    connections: int = 1
    read_percent: int = 70
    flush_every: int = 0
    offset: int = 0
    area_bytes: int | None = None
    higher_is_better: bool = True

    @property
    def unit(self) -> str:
        """Requests for small blocks, bytes for large ones."""
        return "MB/s" if self.block_bytes >= 64 << 10 else "kIOPS"

    def command(self, uri: str, size_bytes: int, seconds: float) -> list[str]:
        """The command line."""
        area_bytes = self.area_bytes or (size_bytes if "read" in self.rw else min(size_bytes, WRITE_AREA_BYTES))
        return [
            *("fio", "--output-format=json", "--name=cell", "--ioengine=nbd", f"--uri={uri}", "--thread"),
            *(f"--rw={self.rw}", f"--bs={self.block_bytes}", f"--iodepth={self.depth}"),
            *(f"--numjobs={self.connections}", "--group_reporting", "--unified_rw_reporting=1"),
            *(f"--rwmixread={self.read_percent}", f"--fsync={self.flush_every}"),
            *(f"--offset={self.offset}", f"--size={area_bytes}", "--norandommap", "--percentile_list=50:99"),
            *("--time_based", f"--runtime={round(seconds * 1000)}ms", "--buffer_compress_percentage=0"),
        ]

    def measure(self, place: Place) -> Sample:
        """Read or write for the given time."""
        cpu_before_s = process.cpu_seconds(place.peer.pid)
        out = place.client(
            *self.command(place.peer.uri(), place.size_bytes, place.seconds), timeout_s=place.seconds + 60
        )
        return self.sample(out, process.cpu_seconds(place.peer.pid) - cpu_before_s, place.peer.pid)

    def sample(self, out: str, cpu_s: float, pid: int) -> Sample:
        """What fio's report says."""
        # fio writes a line for every connection before the report.
        told = json.loads(out[out.index("{") :])["jobs"][0]["mixed"]
        percentiles = told["clat_ns"]["percentile"]
        return Sample(
            value=told["bw_bytes"] / 1e6 if self.unit == "MB/s" else told["iops"] / 1e3,
            requests=told["total_ios"],
            transferred_bytes=told["io_bytes"],
            p50_us=percentiles["50.000000"] / 1e3,
            p99_us=percentiles["99.000000"] / 1e3,
            cpu_s=cpu_s,
            peak_resident_bytes=process.peak_resident_bytes(pid),
        )


@dataclass(frozen=True)
class FuaWrites:
    """4 KiB writes that each must be on the disk before they are answered, by qemu-img (fio's engine knows no FUA)."""

    depth: int
    unit: str = "kIOPS"
    higher_is_better: bool = True

    def measure(self, place: Place) -> Sample:
        """First a few requests to see the pace, then as many as fill the time."""
        probe_s = self._writes(place, PROBE_REQUESTS)
        requests = round(min(max(PROBE_REQUESTS, PROBE_REQUESTS / probe_s * place.seconds), LAST_REQUEST))
        cpu_before_s = process.cpu_seconds(place.peer.pid)
        elapsed_s = self._writes(place, requests)
        return Sample(
            value=requests / elapsed_s / 1e3,
            requests=requests,
            cpu_s=process.cpu_seconds(place.peer.pid) - cpu_before_s,
            peak_resident_bytes=process.peak_resident_bytes(place.peer.pid),
        )

    def _writes(self, place: Place, requests: int) -> float:
        out = place.client(
            *("qemu-img", "bench", "-w", "-t", "writethrough", "-f", "raw", "-s", "4096", "-d", str(self.depth)),
            *("-c", str(requests), place.peer.uri()),
        )
        found = re.search(r"completed in ([0-9.]+) seconds", out)
        assert found, f"qemu-img bench gives no time: {out}"
        return max(float(found[1]), 0.001)


@dataclass(frozen=True)
class CachedBesideUncached:
    """The latency of a reader of cached data while another connection reads what is not in the page cache."""

    unit: str = "µs p99"
    higher_is_better: bool = False

    def measure(self, place: Place) -> Sample:
        """The p99 of the cached reader, with that of the same reader alone in the notes."""
        uri = place.peer.uri()
        cached = Fio("randread", 4096, 1, area_bytes=COLD_FROM_BYTES)
        cold_bytes = place.size_bytes - COLD_FROM_BYTES
        uncached = Fio("randread", 64 << 10, 4, offset=COLD_FROM_BYTES, area_bytes=cold_bytes)
        pid = place.peer.pid
        alone = cached.sample(place.client(*cached.command(uri, place.size_bytes, place.seconds / 2)), 0, pid)
        fincore = shutil.which("fincore", path=SYSTEM_PATH)
        assert fincore, "fincore was there when the run began"
        left = cool(place.disks.random, COLD_FROM_BYTES, fincore)
        with tempfile.TemporaryFile() as report:
            other = subprocess.Popen(uncached.command(uri, place.size_bytes, place.seconds), stdout=report)
            try:
                beside = cached.sample(place.client(*cached.command(uri, place.size_bytes, place.seconds / 2)), 0, pid)
                status = other.wait(place.seconds + 60)
            finally:
                other.kill()
                other.wait()
            assert status == 0, f"fio ended with status {status}"
            report.seek(0)
            rate = uncached.sample(report.read().decode(), 0, pid)
        assert beside.p99_us
        note = f"alone {alone.p99_us:.0f} µs; the uncached reader had {rate.value:.0f} MB/s; {left:.0%} stayed cached"
        return Sample(beside.p99_us, p50_us=beside.p50_us, p99_us=beside.p99_us, notes=(note,))


@dataclass(frozen=True)
class Memory:
    """Resident memory while a disk of 1 TiB is served."""

    under_load: bool
    unit: str = "MiB"
    higher_is_better: bool = False

    def measure(self, place: Place) -> Sample:
        """After one answered read, or the peak of 64 connections that read and write."""
        if self.under_load:
            load = Fio("randrw", 64 << 10, 8, connections=64, area_bytes=place.size_bytes)
            place.client(*load.command(place.peer.uri(), place.size_bytes, place.seconds))
            used_bytes = process.peak_resident_bytes(place.peer.pid)
        else:
            read_once(place.peer)
            used_bytes = process.resident_bytes(place.peer.pid)
        return Sample(used_bytes / (1 << 20), peak_resident_bytes=process.peak_resident_bytes(place.peer.pid))


def start_to_first_read(start: Callable[[], AbstractContextManager[Peer]]) -> Sample:
    """Milliseconds from the start of a server's process to the first answered read."""
    begun_s = time.perf_counter()
    with start() as peer:
        read_once(peer)
        elapsed_s = time.perf_counter() - begun_s
        return Sample(elapsed_s * 1e3, peak_resident_bytes=process.peak_resident_bytes(peer.pid))


@dataclass(frozen=True)
class Start:
    """The time from start to the first answered read; the server is started by the measurement itself."""

    unit: str = "ms"
    higher_is_better: bool = False

    def measure(self, place: Place) -> Sample:
        """Not for a server that runs already: see `start_to_first_read`."""
        raise TypeError(f"{place.peer.name} runs already")


def read_once(peer: Peer, length: int = 512) -> bytes:
    """The first bytes of a server's default export, asked for in the plainest way: EXPORT_NAME and one simple request.

    By hand and not by the library that is measured here, nor by a client program whose own start would be in the time.
    """
    with peer.endpoint.connect() as connection:
        stream = connection.makefile("rb")
        magic, option_magic, _ = struct.unpack(">8sQH", _exactly(stream.read, 18))
        assert (magic, option_magic) == (b"NBDMAGIC", 0x49484156454F5054), f"no NBD greeting: {magic!r}"
        fixed_newstyle_without_zeroes, export_name = 3, 1
        name = peer.default_export.encode()
        option = struct.pack(">IQII", fixed_newstyle_without_zeroes, option_magic, export_name, len(name))
        connection.sendall(option + name)
        _exactly(stream.read, 10)
        read, cookie = 0, 1
        connection.sendall(struct.pack(">IHHQQI", 0x25609513, 0, read, cookie, 0, length))
        reply, error, echoed = struct.unpack(">IIQ", _exactly(stream.read, 16))
        assert (reply, error, echoed) == (0x67446698, 0, cookie), f"reply {reply:#x}, error {error}, cookie {echoed}"
        return _exactly(stream.read, length)


def fill(uri: str, size_bytes: int) -> None:
    """Write a whole disk in memory once, so that reads find data there."""
    command = ["fio", "--name=fill", "--ioengine=nbd", f"--uri={uri}", "--rw=write", "--bs=1M", "--iodepth=4"]
    run(*command, f"--size={size_bytes}", "--refill_buffers")


def _exactly(read: Callable[[int], bytes], count: int) -> bytes:
    data = read(count)
    assert len(data) == count, f"the server hung up after {len(data)} of {count} bytes"
    return data

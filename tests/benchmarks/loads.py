"""What is done to a server in one measurement, and what that gives."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from tests.benchmarks import process
from tests.benchmarks.disks import Disks, cool
from tests.peers import SYSTEM_PATH, Peer, run

WRITE_AREA_BYTES = 128 << 20
"""Writes stay in this much of a disk: what they leave in the page cache has to be written out before the next cell."""

COLD_FROM_BYTES = 64 << 20
"""Where the part of the disk begins that is dropped from the page cache, for the cell that reads such data."""

WARM_UP_S = 0.15
"""Every measurement begins with so long of the same load that is not counted."""

PROBE_REQUESTS = 256
"""So many requests tell how many qemu-img bench can do in the time it is given; it counts requests, not seconds."""

NOBODY = 65534
"""A user who owns nothing."""

LAST_REQUEST = 1_000_000
"""The most requests that qemu-img bench is ever given."""


class Client(Enum):
    """Whose implementation of NBD asks: what is negotiated depends on it."""

    LIBNBD = "libnbd"
    QEMU = "qemu"
    OWN = "the benchmark itself"
    NOBODY = "nobody: a command about files"


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


def tls_uri(peer: Peer) -> str:
    """Where a server is reached through TLS."""
    return peer.uri().replace("nbd://", "nbds://", 1)


@dataclass(frozen=True)
class Sample:
    """What one measurement gave. `value` is what contenders are compared by; None stands for what can't be had.

    `client_busy` is the part of the time that the client itself was at work, 1 for one processor.
    """

    value: float
    requests: int | None = None
    transferred_bytes: int | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    cpu_s: float | None = None
    client_busy: float | None = None
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

    @property
    def client(self) -> Client:
        """Who asks."""

    def measure(self, place: Place) -> Sample:
        """Load the server and tell what came of it. Raises CommandError when a client fails."""


@dataclass(frozen=True)
class Fio:
    """fio's nbd engine, over one connection or several.

    With `tls` it runs as a user without rights: only then does libnbd look for certificates in its home.
    """

    rw: str
    block_bytes: int
    depth: int
    connections: int = 1
    read_percent: int = 70
    flush_every: int = 0
    offset: int = 0
    area_bytes: int | None = None
    tls: bool = False
    higher_is_better: bool = True
    client: Client = Client.LIBNBD

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
            *("--time_based", f"--runtime={round(seconds * 1000)}ms", f"--ramp_time={round(WARM_UP_S * 1000)}ms"),
            "--buffer_compress_percentage=0",
        ]

    def measure(self, place: Place) -> Sample:
        """Read or write for the given time."""
        cpu_before_s = process.cpu_seconds(place.peer.pid)
        command = self.command(tls_uri(place.peer) if self.tls else place.peer.uri(), place.size_bytes, place.seconds)
        if self.tls:
            nobody = ["setpriv", f"--reuid={NOBODY}", "--clear-groups"] if os.geteuid() == 0 else []
            command = ["env", "-C", str(place.disks.home), f"HOME={place.disks.home}", *nobody, *command]
        out = place.client(*command, timeout_s=place.seconds + 60)
        # The warm-up is not in fio's count of requests, but in the server's processor time.
        counted = place.seconds / (place.seconds + WARM_UP_S)
        return self.sample(out, (process.cpu_seconds(place.peer.pid) - cpu_before_s) * counted, place.peer.pid)

    def sample(self, out: str, cpu_s: float, pid: int) -> Sample:
        """What fio's report says."""
        # fio writes a line for every connection before the report.
        job = json.loads(out[out.index("{") :])["jobs"][0]
        told = job["mixed"]
        percentiles = told["clat_ns"]["percentile"]
        return Sample(
            value=told["bw_bytes"] / 1e6 if self.unit == "MB/s" else told["iops"] / 1e3,
            requests=told["total_ios"],
            transferred_bytes=told["io_bytes"],
            p50_us=percentiles["50.000000"] / 1e3,
            p99_us=percentiles["99.000000"] / 1e3,
            cpu_s=cpu_s,
            # Per cent, of one connection's thread on the average.
            client_busy=(job["usr_cpu"] + job["sys_cpu"]) / 100 * self.connections,
            peak_resident_bytes=process.peak_resident_bytes(pid),
        )


@dataclass(frozen=True)
class QemuImgBench:
    """Requests from the disk's beginning on, as QEMU's own client makes them.

    With `durable` each write must be on the disk before it is answered (fio's engine knows no FUA).
    """

    block_bytes: int
    depth: int
    writes: bool = False
    durable: bool = False
    higher_is_better: bool = True
    client: Client = Client.QEMU

    @property
    def unit(self) -> str:
        """Requests for small blocks, bytes for large ones."""
        return "MB/s" if self.block_bytes >= 64 << 10 else "kIOPS"

    def command(self, uri: str, size_bytes: int, requests: int) -> list[str]:
        """The command line."""
        return [
            *("qemu-img", "bench", "-f", "raw", "-t", "writethrough" if self.durable else "writeback"),
            *(["-w"] if self.writes else []),
            *("-s", str(self.block_bytes), "-d", str(self.depth), "-c", str(requests), uri),
        ]

    def measure(self, place: Place) -> Sample:
        """First a few requests, to warm up and to see the pace, then as many as fill the time."""
        probe_s = self._elapsed_s(place, PROBE_REQUESTS)
        requests = round(min(max(PROBE_REQUESTS, PROBE_REQUESTS / probe_s * place.seconds), LAST_REQUEST))
        cpu_before_s = process.cpu_seconds(place.peer.pid)
        elapsed_s = self._elapsed_s(place, requests)
        moved_bytes = requests * self.block_bytes
        return Sample(
            value=moved_bytes / elapsed_s / 1e6 if self.unit == "MB/s" else requests / elapsed_s / 1e3,
            requests=requests,
            transferred_bytes=moved_bytes,
            cpu_s=process.cpu_seconds(place.peer.pid) - cpu_before_s,
            peak_resident_bytes=process.peak_resident_bytes(place.peer.pid),
        )

    def _elapsed_s(self, place: Place, requests: int) -> float:
        out = place.client(*self.command(place.peer.uri(), place.size_bytes, requests))
        found = re.search(r"completed in ([0-9.]+) seconds", out)
        assert found, f"qemu-img bench gives no time: {out}"
        return max(float(found[1]), 0.001)


@dataclass(frozen=True)
class NbdCopy:
    """The whole disk to nowhere, again and again, as nbdcopy copies: several connections, many requests."""

    unit: str = "MB/s"
    higher_is_better: bool = True
    client: Client = Client.LIBNBD

    def measure(self, place: Place) -> Sample:
        """One copy that is not counted, then as many as fill the time."""
        self._copy(place)
        cpu_before_s, begun_s, copies = process.cpu_seconds(place.peer.pid), time.perf_counter(), 0
        while (elapsed_s := time.perf_counter() - begun_s) < place.seconds:
            self._copy(place)
            copies += 1
        copied_bytes = copies * place.size_bytes
        return Sample(
            value=copied_bytes / elapsed_s / 1e6,
            requests=copied_bytes >> 18,
            transferred_bytes=copied_bytes,
            cpu_s=process.cpu_seconds(place.peer.pid) - cpu_before_s,
            peak_resident_bytes=process.peak_resident_bytes(place.peer.pid),
        )

    def _copy(self, place: Place) -> None:
        place.client("nbdcopy", place.peer.uri(), "null:")


@dataclass(frozen=True)
class Uncached(Fio):
    """The same of what is not in the page cache, but has to come from the disk."""

    def measure(self, place: Place) -> Sample:
        """Drop the file from the cache before."""
        fincore = shutil.which("fincore", path=SYSTEM_PATH)
        assert fincore, "fincore was there when the run began"
        left = cool(place.disks.random, 0, fincore)
        note = (f"{left:.0%} stayed cached",) if left > 0.01 else ()
        return replace(super().measure(place), notes=note)


@dataclass(frozen=True)
class CachedBesideUncached:
    """The latency of a reader of cached data while another connection reads what is not in the page cache."""

    unit: str = "µs p99"
    higher_is_better: bool = False
    client: Client = Client.LIBNBD

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

    @property
    def client(self) -> Client:
        """fio's engine for the load, one plain request without it."""
        return Client.LIBNBD if self.under_load else Client.OWN

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
    client: Client = Client.OWN

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

"""fio's nbd engine against `pynbd serve`: random writes that are read back and checked, many in flight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.interop.framing import framing_options
from tests.peers import Peer, pynbd_serve, require_tool, run

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _fio() -> None:
    require_tool("fio")


def fio(peer: Peer, *options: str) -> dict[str, Any]:
    """Run fio on one disk of ours, and give what it tells of its jobs together; an error of any fails it."""
    command = ["fio", "--name=job", "--ioengine=nbd", f"--uri={peer.uri()}", "--output-format=json+", *options]
    said = run(*command, "--group_reporting", "--verify_fatal=1", "--verify_state_save=0")
    job = json.loads(said[said.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert isinstance(job, dict)
    return job


FOUR_JOBS = ("--numjobs=4", "--offset_increment=16M", "--size=16M")
"""Four connections, each with a quarter of a disk of 64 MiB to itself."""

VERIFY = ("--rw=randwrite", "--bs=4k", "--iodepth=64", "--verify=crc32c")


@pytest.mark.parametrize("framing", ["simple", "structured"])
def test_random_writes_at_depth_64_over_four_connections(framing: str, empty_disk: Path, tmp_path: Path) -> None:
    with pynbd_serve(*framing_options(framing, tmp_path), "-f", "raw", empty_disk) as peer:
        job = fio(peer, *VERIFY, *FOUR_JOBS)
    assert job["write"]["total_ios"] == job["read"]["total_ios"] == 64 * MIB // 4096


def test_written_by_four_and_verified_by_four_others(empty_disk: Path) -> None:
    """A second fio reads what a first one wrote, after a restart of the server in between."""
    with pynbd_serve("-f", "raw", empty_disk) as peer:
        fio(peer, *VERIFY, *FOUR_JOBS, "--do_verify=0", "--end_fsync=1", "--randseed=7")
    with pynbd_serve("-f", "raw", "-r", empty_disk) as peer:
        job = fio(peer, *VERIFY, *FOUR_JOBS, "--verify_only=1", "--randseed=7")
    assert job["read"]["total_ios"] == 64 * MIB // 4096


def test_blocks_of_mixed_sizes_on_a_disk_in_memory() -> None:
    with pynbd_serve("driver=memory,size=64M", tcp=True) as peer:
        sizes = ["--rw=randwrite", "--bsrange=512-256k", "--bs_unaligned=0", "--blockalign=512"]
        fio(peer, *sizes, "--iodepth=64", "--verify=crc32c", *FOUR_JOBS)


def test_reads_writes_and_trims_together(empty_disk: Path) -> None:
    with pynbd_serve("-f", "raw", "--discard=unmap", empty_disk) as peer:
        fio(peer, "--rw=randtrimwrite", "--bs=16k", "--iodepth=64", *FOUR_JOBS)
        job = fio(peer, "--rw=randrw", "--bs=4k", "--iodepth=64", "--fsync=64", *FOUR_JOBS)
    assert job["read"]["total_ios"] + job["write"]["total_ios"] == 64 * MIB // 4096

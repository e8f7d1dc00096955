"""Commands that reserve space are ended by a signal on their way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import peers
from tests.peers import require_tool, run

MIB = 1 << 20

SIGNAL_ON_THE_WAY = """
import os, sys
from pynbd.cli import command
from pynbd.storage import transfers

number, lengths, write_at = int(sys.argv.pop(1)), [], transfers.write_at

def counting_write_at(fd, data, *more):
    lengths.append(len(data))
    if lengths.count(1 << 20) == 5 and len(data) == 1 << 20:
        os.kill(os.getpid(), number)
    return write_at(fd, data, *more)

transfers.write_at = counting_write_at
sys.exit(command())
"""
"""A program that has itself killed by a signal when it writes a MiB for the fifth time."""


def signalled(number: int, *words: str) -> None:
    """Run `pynbd img` so; it must say nothing, and end as whom the signal has killed."""
    command = [sys.executable, "-c", SIGNAL_ON_THE_WAY, str(number), "img", *words]
    ended = subprocess.run(command, capture_output=True, timeout=peers.COMMAND_LIMIT_S)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + number, b"", b""), ended.stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_create_leaves_nothing(format: str, number: int) -> None:
    signalled(number, "create", "-q", "-f", format, "-o", "preallocation=full", "new", "1G")
    assert not Path("new").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_raw_disks_keep_their_length(disk: Path, number: int) -> None:
    before = disk.read_bytes()
    signalled(number, "resize", "-q", "-f", "raw", "--preallocation=full", str(disk), "1G")
    assert disk.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_images_keep_their_length(disk: Path, number: int) -> None:
    """No cluster is counted that nothing points to."""
    qemu_img, image = require_tool("qemu-img"), "image.qcow2"
    run(qemu_img, "convert", "-f", "raw", "-O", "qcow2", disk, image)
    signalled(number, "resize", "-q", "-f", "qcow2", "--preallocation=full", image, "1G")
    run(qemu_img, "check", "-q", "-f", "qcow2", image)
    run(qemu_img, "compare", "-q", "-f", "raw", "-F", "qcow2", disk, image)
    assert json.loads(run(qemu_img, "info", "--output=json", image))["virtual-size"] == disk.stat().st_size
    assert 4 * MIB < Path(image).stat().st_size < 100 * MIB

"""Snapshots with the state of a machine, which QEMU has saved: the verbs keep it and tell of it as qemu-img does."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import peers
from tests.cli.img.chains import make_chain, qemu, qemu_io
from tests.cli.img.side_by_side import ok, same

TOLD = (
    "snapshot -l",
    "info",
    "info --output=json",
    "check",
    "map --output=json",
    "measure -O qcow2",
    "compare top.qcow2",
)


def save_machines(image: str, *names: str) -> None:
    """Let a machine that was never started save its state into the image, once under each name."""
    program = peers.require_tool("qemu-system-x86_64", package="qemu-system-x86")
    node = {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": image}}
    ours, theirs = socket.socketpair()
    machine = ("-M", "microvm,accel=tcg", "-nodefaults", "-display", "none", "-m", "16", "-S")
    with ours, theirs:
        monitor = f"socket,id=qmp,fd={theirs.fileno()}"
        process = subprocess.Popen(
            [
                *(program, *machine, "-blockdev", json.dumps(node), "-device", "virtio-blk-device,drive=disk"),
                *("-chardev", monitor, "-mon", "chardev=qmp,mode=control"),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            with ours.makefile("rw") as lines:
                json.loads(lines.readline())
                for command in ("qmp_capabilities", *names, "quit"):
                    assert _answer(lines, command) in ({}, "")
            assert process.wait(timeout=peers.COMMAND_LIMIT_S) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _answer(lines: Any, command: str) -> Any:
    """What QEMU says to a command, or to savevm under that name."""
    words: dict[str, Any] = {"execute": command}
    if command not in ("qmp_capabilities", "quit"):
        words = {"execute": "human-monitor-command", "arguments": {"command-line": f"savevm {command}"}}
    lines.write(json.dumps(words) + "\n")
    lines.flush()
    while True:
        answer = json.loads(lines.readline())
        assert "error" not in answer, answer
        if "return" in answer:
            return answer["return"]


@pytest.fixture
def image(folder: Path) -> str:
    """`vm.qcow2`, of a disk with data, and two snapshots with a state."""
    make_chain()
    qemu("create", "-q", "-f", "qcow2", "vm.qcow2", "5M")
    qemu_io("vm.qcow2", "write -P 1 0 1M")
    save_machines("vm.qcow2", "one", "two")
    return "vm.qcow2"


def test_what_is_told(image: str) -> None:
    assert "KiB" in same("snapshot", "-l", image)
    for command in TOLD:
        verb, *words = command.split()
        same(verb, *([image, words[0]] if verb == "compare" else [*words, image]))
    same("measure", "-O", "qcow2", "-l", "one", image)
    same("convert", "-l", "one", image, "one.raw")
    same("compare", "one.raw", image)


@pytest.mark.parametrize(
    "commands",
    [
        ("snapshot -a one",),
        ("snapshot -d one",),
        ("snapshot -d one", "snapshot -d two"),
        ("resize +1M", "snapshot -a one"),
        ("amend -o compat=0.10", "snapshot -a two"),
        ("amend -o refcount_bits=8", "snapshot -a one"),
        ("rebase -b base.qcow2 -F qcow2", "snapshot -a two"),
        ("rebase -u -b base.qcow2 -F qcow2", "commit", "snapshot -a one"),
    ],
)
def test_what_is_kept(commands: tuple[str, ...], image: str) -> None:
    """After the same changes by both qemu-img finds the same in both images."""
    found = []
    content, base = Path(image).read_bytes(), Path("base.qcow2").read_bytes()
    for run in (qemu, ok):
        Path(image).write_bytes(content)
        Path("base.qcow2").write_bytes(base)
        for command in commands:
            verb, *words = command.split()
            run(verb, *([image, *words] if verb == "resize" else [*words, image]))
        told = [qemu("snapshot", "-l", image), qemu("map", "--output=json", image), qemu("check", image)]
        # Where clusters lie is nobody's business.
        found.append([re.sub(r'"offset": \d+|Image end offset: \d+', "", text) for text in told])
    assert found[0] == found[1]

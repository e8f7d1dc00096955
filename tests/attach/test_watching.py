"""`make attach` for a person: scenarios by name, shown as they happen, and a shell in the guest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.attach.conftest import DISK_BYTES
from tests.attach.disks import sparse_disk
from tests.attach.guest import BOOT_TIMEOUT_S, COMMAND_TIMEOUT_S
from tests.attach.kernel import Kernel
from tests.attach.nbd_client import attach_command
from tests.attach.saved_guest import SavedGuest
from tests.attach.server import ServerUnderTest
from tests.attach.watching import WATCH_VARIABLE
from tests.peers import ROOT, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ATTACH = (sys.executable, "-m", "tests.attach")


def test_scenarios_are_listed() -> None:
    assert "test_swap.py::test_memory_is_swapped_out_and_in" in run("env", "-C", ROOT, *ATTACH, "list")


def test_scenario_is_chosen_by_a_part_of_its_name() -> None:
    shown = run("env", "-C", ROOT, *ATTACH, "old_boot_protocol")
    assert "test_bzimage.py::test_old_boot_protocol_is_named PASSED" in shown
    assert "1 passed" in shown


def test_guest_and_server_are_shown_while_they_run(
    saved_guest: SavedGuest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(WATCH_VARIABLE, "1")
    disk = sparse_disk(tmp_path / "disk.raw", DISK_BYTES)
    with ServerUnderTest(disk, tmp_path / "server.log") as server, saved_guest.restored(tmp_path) as guest:
        command = attach_command(server)
        guest.run(command)
        shown = capsys.readouterr().err
    assert f"host$ pynbd serve --discard unmap -b 127.0.0.1 -p {server.port} -x disk {disk}\n" in shown
    assert f"$ {command}\nNegotiation: ..size = {DISK_BYTES >> 20}MB\nConnected /dev/nbd0\n" in shown
    assert "end of command" not in shown


def test_person_has_a_shell_in_the_guest(kernel: Kernel) -> None:
    with pexpect.spawn(ATTACH[0], [*ATTACH[1:], "shell"], cwd=ROOT, encoding="utf-8") as person:
        person.expect(r"nbd-client 10.0.2.2 (\d+) ", timeout=BOOT_TIMEOUT_S)
        port = person.match[1]
        ask(person, "uname -r", expected=kernel.release)
        ask(person, f"nbd-client 10.0.2.2 {port} /dev/nbd0 -N disk", expected="Connected /dev/nbd0")
        ask(person, "blockdev --getsize64 /dev/nbd0", expected=f"\n{1 << 30}\r")
        person.sendline("exit")
        person.expect(pexpect.EOF, timeout=COMMAND_TIMEOUT_S)
        assert person.wait() == 0


def ask(person: Any, command: str, expected: str) -> None:
    person.expect_exact("guest# ", timeout=COMMAND_TIMEOUT_S)
    person.sendline(command)
    person.expect_exact(expected, timeout=COMMAND_TIMEOUT_S)

"""The harness itself: a scenario that goes wrong says why, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attach.conftest import GuestOfModule
from tests.attach.guest import CommandFailedError, Guest, GuestError
from tests.attach.kernel import Kernel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_command_gives_its_output_and_errors_and_keeps_the_shell(guest_of_module: GuestOfModule) -> None:
    guest = guest_of_module.booted()
    assert guest.run("cd /tmp\necho 'a  b'; echo c >&2") == "a  b\nc\n"
    assert guest.run("pwd") == "/tmp\n"
    assert guest.run("cat") == ""


def test_failed_command_tells_its_status_and_shows_the_console(guest_of_module: GuestOfModule) -> None:
    guest = guest_of_module.booted()
    guest.run("echo before")
    with pytest.raises(CommandFailedError, match=r"(?s)exit 3 from: .*before") as failure:
        guest.run("echo why; (exit 3)")
    assert (failure.value.status, failure.value.output) == (3, "why\n")
    assert guest.run("echo after") == "after\n"


def test_guest_that_does_not_answer_in_time_is_replaced(guest_of_module: GuestOfModule) -> None:
    stuck = guest_of_module.booted()
    with pytest.raises(GuestError, match=r"not done after 0.5 s: sleep 1000"):
        stuck.run("sleep 1000", timeout_s=0.5)
    assert not stuck.usable
    with pytest.raises(GuestError, match=r"not usable"):
        stuck.run("true")
    assert guest_of_module.booted().run("echo fresh") == "fresh\n"


def test_lost_guest_shows_what_its_kernel_said(kernel: Kernel, initramfs: Path, tmp_path: Path) -> None:
    with Guest(kernel, initramfs, tmp_path) as guest:
        with pytest.raises(GuestError, match=r"(?s)the guest was lost.*sysrq triggered crash"):
            guest.run("echo c >/proc/sysrq-trigger")
        assert not guest.usable


def test_drive_that_qemu_cannot_open_shows_what_qemu_said(kernel: Kernel, initramfs: Path, tmp_path: Path) -> None:
    drive = f"file={tmp_path}/no-such-disk,format=raw,if=virtio"
    with pytest.raises(GuestError, match=r"(?s)the guest was lost in: boot.*no-such-disk"):
        Guest(kernel, initramfs, tmp_path, drives=[drive]).__enter__()

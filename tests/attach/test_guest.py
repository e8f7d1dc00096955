"""The harness itself: a scenario that goes wrong says why, and leaves nothing behind."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest

from tests.attach.guest import CommandFailedError, Guest, GuestError
from tests.attach.kernel import Kernel
from tests.attach.saved_guest import SavedGuest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CLOCK_ERROR_S = 30
"""A guest whose clock was not set would be as late as it was saved before: minutes, in a whole run."""


def test_command_gives_its_output_and_errors_and_keeps_the_shell(guest: Guest) -> None:
    assert guest.run("cd /tmp\necho 'a  b'; echo c >&2") == "a  b\nc\n"
    assert guest.run("pwd") == "/tmp\n"
    assert guest.run("cat") == ""


def test_failed_command_tells_its_status_and_shows_the_console(guest: Guest) -> None:
    guest.run("echo before")
    with pytest.raises(CommandFailedError, match=r"(?s)exit 3 from: .*before") as failure:
        guest.run("echo why; (exit 3)")
    assert (failure.value.status, failure.value.output) == (3, "why\n")
    assert guest.run("echo after") == "after\n"


def test_command_that_does_not_end_in_time_makes_the_guest_unusable(guest: Guest) -> None:
    with pytest.raises(GuestError, match=r"not done after 0.5 s: sleep 1000"):
        guest.run("sleep 1000", timeout_s=0.5)
    assert not guest.usable
    with pytest.raises(GuestError, match=r"not usable"):
        guest.run("true")


def test_file_is_put_into_the_guest(guest: Guest) -> None:
    content = bytes(range(256)) * 40
    guest.put_file("/tmp/file", content)
    assert guest.run("sha256sum </tmp/file").split()[0] == hashlib.sha256(content).hexdigest()


def test_restored_guest_goes_on_where_it_was_saved(saved_guest: SavedGuest, tmp_path: Path) -> None:
    """With its kernel's modules, a clock that is right, and no sign of another guest from the same state."""
    for _ in range(2):
        with saved_guest.restored(tmp_path) as guest:
            assert guest.status_of("test -e /tmp/trace; echo trace >/tmp/trace")[1] == ""
            assert guest.run("ls -d /sys/block/nbd*").split() == ["/sys/block/nbd0", "/sys/block/nbd1"]
            assert abs(int(guest.run("date +%s")) - time.time()) < CLOCK_ERROR_S


def test_state_that_is_damaged_is_refused(saved_guest: SavedGuest, tmp_path: Path) -> None:
    damaged = tmp_path / "state"
    damaged.write_bytes(saved_guest.state.read_bytes()[: 1 << 20])
    with (
        Guest(saved_guest.kernel, saved_guest.initramfs, tmp_path, arriving=True) as guest,
        pytest.raises(GuestError, match="restore"),
    ):
        guest.restore(damaged)


def test_lost_guest_shows_what_its_kernel_said(saved_guest: SavedGuest, tmp_path: Path) -> None:
    with saved_guest.restored(tmp_path) as guest:
        with pytest.raises(GuestError, match=r"(?s)the guest was lost.*sysrq triggered crash"):
            guest.run("echo c >/proc/sysrq-trigger")
        assert not guest.usable


def test_drive_that_qemu_cannot_open_shows_what_qemu_said(kernel: Kernel, initramfs: Path, tmp_path: Path) -> None:
    drive = f"file={tmp_path}/no-such-disk,format=raw,if=virtio"
    with pytest.raises(GuestError, match=r"(?s)the guest was lost in: boot.*no-such-disk"):
        Guest(kernel, initramfs, tmp_path, ["-drive", drive]).__enter__()

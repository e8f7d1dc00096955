"""Signals that end a command that copies."""

import asyncio
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from pynbd.cli.interruption import Interrupted, Interruption
from tests import peers
from tests.cli.pynbd_command import PYNBD

FLOOD = 5000
"""Signals: more than a socket holds bytes, each of which takes a buffer of its own."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_flood_of_others_hides_none(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost, and nothing is said about it, though the loop could not look at any of them."""
    asked = 0

    def ask(*_: object) -> None:
        nonlocal asked
        asked += 1

    async def copy() -> None:
        with Interruption().listening():
            for _ in range(FLOOD):
                signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(number)
            await asyncio.sleep(60)

    before = signal.signal(signal.SIGUSR1, ask)
    try:
        with pytest.raises(Interrupted) as caught:
            asyncio.run(copy())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert caught.value.number == number
    assert asked == FLOOD
    assert capfd.readouterr().err == ""


def test_what_was_there_before_is_there_again() -> None:
    """The signals do again what they did."""

    async def copy() -> None:
        with Interruption().listening():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

    asyncio.run(copy())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_are_let_through_where_no_handler_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was blocked for a moment is not blocked for good."""

    def refuse(*_: object) -> None:
        raise RuntimeError("only in the main thread")

    async def copy() -> None:
        monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", refuse)
        with Interruption().listening():
            pytest.fail("it was not refused")

    with pytest.raises(RuntimeError, match="main thread"):
        asyncio.run(copy())
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_who_is_cancelled_by_others_stays_cancelled() -> None:
    """No signal has come."""

    async def copy() -> None:
        with Interruption().listening():
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(copy())


def status_after(process: subprocess.Popen[bytes], number: signal.Signals) -> tuple[int, bytes]:
    """The exit status of a process after a signal, and what it said on stderr."""
    process.send_signal(number)
    _, err = process.communicate(timeout=peers.COMMAND_LIMIT_S)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["convert", "commit", "dd"])
def test_the_status_tells_which_signal_ended_a_copy(verb: str, number: signal.Signals, tmp_path: Path) -> None:
    """As with qemu-img, which it kills; but nothing half-made is left, and what is left is told."""
    image, target = tmp_path / "top.qcow2", tmp_path / "target.raw"
    qemu_img = peers.require_tool("qemu-img", package="qemu-utils")
    if verb == "commit":
        peers.run(qemu_img, "create", "-q", "-f", "raw", target, "64M")
        peers.run(qemu_img, "create", "-q", "-f", "qcow2", "-b", target, "-F", "raw", image)
        peers.run(peers.require_tool("qemu-io", package="qemu-utils"), "-c", "write -P 1 0 64M", image)
    with peers.nbdkit("pattern", "1G", "rdelay=100ms", options=["--filter=delay", "--filter=noextents"]) as peer:
        words = {
            "convert": ["-f", "raw", "-m", "1", peer.uri(), str(target)],
            "commit": ["-r", "8M", str(image)],
            "dd": ["-f", "raw", f"if={peer.uri()}", f"of={target}"],
        }
        process = subprocess.Popen([*PYNBD, "img", verb, *words[verb]], stderr=subprocess.PIPE)
        while not target.exists() or target.stat().st_blocks * 512 < 1 << 20:
            assert process.poll() is None
        status, err = status_after(process, number)
    assert status == 128 + number, err
    assert err.startswith(f"pynbd img {verb}: interrupted; ".encode())
    assert target.exists() == (verb == "commit")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_status_before_a_copy(number: signal.Signals, tmp_path: Path) -> None:
    """Nothing has been made, and there is nothing to tell."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        words = ("convert", f"nbd+unix:///?socket={tmp_path / 's'}", str(tmp_path / "target.raw"))
        process = subprocess.Popen([*PYNBD, "img", *words], stderr=subprocess.PIPE)
        server.settimeout(peers.COMMAND_LIMIT_S)
        with server.accept()[0]:
            assert status_after(process, number) == (128 + number, b"")

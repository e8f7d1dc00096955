"""What nbd-client says and asks before it hands the socket to the kernel; the kernel itself is in tests/attach."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers import pynbd_serve, require_tool, run


@pytest.fixture(autouse=True)
def _nbd_client() -> None:
    require_tool("nbd-client")


def test_list(random_disk: Path) -> None:
    """`nbd-client -l`: the names, and the connection ends in order."""
    with pynbd_serve("-f", "raw", "-r", f"one={random_disk}", f"two words={random_disk}", tcp=True) as peer:
        said = run("nbd-client", "-l", peer.endpoint.host, str(peer.endpoint.port))
        assert said.splitlines()[-2:] == ["one", "two words"]
        unix_again = run("nbd-client", "-l", peer.endpoint.host, str(peer.endpoint.port))
        assert unix_again == said


def test_goes_without_asking_for_anything(random_disk: Path) -> None:
    """nbd-client sends GO with no info requests; it must be let in, and learn the size.

    Without the kernel's module it ends there, or at a device that isn't one.
    """
    with pynbd_serve("-v", "-f", "raw", "-x", "disk", random_disk, tcp=True) as peer:
        place = [peer.endpoint.host, str(peer.endpoint.port), "/dev/null"]
        said = run("nbd-client", *place, "-N", "disk", "-L", status=1)
        assert "size = 8MB" in said
        peer.until_logged("uses export 'disk' (simple)")


def test_goes_over_a_unix_socket(random_disk: Path) -> None:
    with pynbd_serve("-v", "-f", "raw", random_disk) as peer:
        said = run("nbd-client", "-unix", str(peer.endpoint.socket_path), "/dev/null", "-L", status=1)
        assert "size = 8MB" in said


def test_an_unknown_name_is_refused_in_words(random_disk: Path) -> None:
    with pynbd_serve("-v", "-f", "raw", "-x", "disk", random_disk, tcp=True) as peer:
        place = [peer.endpoint.host, str(peer.endpoint.port), "/dev/null"]
        said = run("nbd-client", *place, "-N", "other", "-L", status=1)
        assert "size" not in said
        assert "uses export" not in peer.log()

"""The harness of real peers keeps its promises: servers run, end, and are named when something is missing."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

import pytest

from tests import peers

RULES = Path(__file__).parent / "conftest.py"


def _is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    # A daemon that has ended may stay in the table until the init process reads its status.
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
def test_servers_answer_and_end(random_disk: Path, tcp: bool) -> None:
    """Each server exports the disk's size, and its process is gone when the block is left."""
    nbdinfo = peers.require_tool("nbdinfo", package="libnbd-bin")
    servers = [
        (peers.qemu_nbd(random_disk, tcp=tcp), ""),
        (peers.nbdkit("file", random_disk, tcp=tcp), ""),
        (peers.nbd_server({"disk": random_disk}, tcp=tcp), "disk"),
    ]
    for server, export in servers:
        with server as peer:
            assert int(peers.run(nbdinfo, "--size", peer.uri(export))) == 8 << 20
            assert _is_running(peer.pid)
        assert not _is_running(peer.pid)


def test_recent_qemu_answers(random_disk: Path) -> None:
    """The QEMU beside the system's runs as client and as server."""
    with peers.qemu_nbd(random_disk, qemu10=True) as peer:
        assert "virtual size: 8 MiB" in peers.run(peers.require_qemu10("qemu-img"), "info", peer.uri())


def test_nbdsh_runs() -> None:
    """Nbdsh finds its bindings whatever Python runs the tests."""
    assert peers.run(*peers.require_nbdsh(), "-c", "print(h.get_version())").strip()


def test_server_that_does_not_start_tells_why(tmp_path: Path) -> None:
    """The server's own words are in the error."""
    with pytest.raises(peers.CommandError, match=r"missing\.raw"), peers.qemu_nbd(tmp_path / "missing.raw"):
        pass


def test_stop_returns_the_exit_status(random_disk: Path) -> None:
    """A server that was killed says so, and isn't stopped a second time."""
    with peers.qemu_nbd(random_disk) as peer:
        assert peer.stop(signal.SIGKILL) == -signal.SIGKILL


def test_run_tells_the_errors_of_a_program() -> None:
    """An unexpected status carries both streams."""
    code = "import sys; print('said'); sys.exit('complained')"
    with pytest.raises(peers.CommandError, match=r"(?s)status 1, expected 0.*said.*complained"):
        peers.run(sys.executable, "-c", code)
    assert peers.run(sys.executable, "-c", code, status=1) == "said\n"


async def test_run_beside_loop_is_run() -> None:
    """The same, without standing in the way of the loop."""
    assert await peers.run_beside_loop("cat", stdin=b"through") == "through"
    with pytest.raises(peers.CommandError, match="killed after"):
        await peers.run_beside_loop(sys.executable, "-c", "import signal; signal.pause()", timeout_s=0.2)


@pytest.mark.parametrize("ci", ["", "true"], ids=["at-home", "in-ci"])
def test_missing_tool_fails_in_ci_only(tmp_path: Path, ci: str) -> None:
    """A skip for want of a tool is a skip at home and a failure in CI; another reason is a skip in both."""
    (tmp_path / "conftest.py").write_text(RULES.read_text())
    bodies = {
        "call": "def test_it():\n    require_tool('missing-in-call')\n",
        "fixture": "@pytest.fixture\ndef it():\n    require_tool('missing-in-fixture')\n\ndef test_it(it):\n    pass\n",
        "module": "pytest.skip(TOOL_MISSING + 'missing-in-module', allow_module_level=True)\n",
        "import": "pytest.importorskip('missing_in_import')\n",
        "other": "def test_it():\n    pytest.skip('another reason')\n",
    }
    for name, body in bodies.items():
        start = "import pytest\nfrom tests.peers import TOOL_MISSING, require_tool\n\n"
        (tmp_path / f"test_{name}.py").write_text(start + body)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-ra"]
    place = ["-c", os.devnull, "--rootdir", str(tmp_path), str(tmp_path)]
    said = peers.run(*command, *place, env={"CI": ci, "PYTHONPATH": str(peers.ROOT)}, status=1 if ci else 0)
    assert re.findall(r"SKIPPED.* (\S+)$", said, re.MULTILINE).count("reason") == 1
    assert ("1 failed, 1 skipped, 3 errors" if ci else "5 skipped") in said
    for reason in ("missing-in-call", "missing-in-fixture", "missing-in-module", "missing_in_import"):
        assert reason in said

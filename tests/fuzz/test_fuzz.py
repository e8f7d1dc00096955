"""Every input that has ever broken something, and the seeds; and a short run of the fuzzer, in search of another."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbd_protocol.constants import ReplyMode
from tests.fuzz.seeds import seeds_of
from tests.fuzz.targets import TARGETS, ServerEnd
from tests.peers import ROOT, require_tool

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 8


def inputs_of(target: str) -> Iterator[bytes]:
    """The seeds, each also cut short and with a byte changed, and what has broken something."""
    if target == "image":
        require_tool("qemu-img", package="qemu-utils")
    seeds = seeds_of(target)
    assert seeds
    yield from seeds
    for seed in seeds[:: len(seeds) // 20 or 1]:
        yield seed[: len(seed) // 2]
        for place in range(1, min(len(seed), 400), 37):
            yield seed[:place] + bytes([seed[place] ^ 0xFF]) + seed[place + 1 :]
    for saved in sorted((CORPUS / target).glob("*")):
        yield saved.read_bytes()


@pytest.mark.parametrize("target", TARGETS)
def test_what_has_broken_something_before(target: str) -> None:
    count = 0
    for data in inputs_of(target):
        TARGETS[target](data)
        count += 1
    assert count > 20


def test_the_seeds_come_to_the_transmission_phase() -> None:
    """Otherwise the fuzzer would have to find the way there."""
    modes = set()
    for seed in seeds_of("server"):
        end = ServerEnd(seed[0])
        end.receive(seed[1:])
        if end._ready is not None:
            modes.add(end._ready.mode)
    assert modes == set(ReplyMode)


def test_a_target_that_is_broken_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that keeps state of how its bytes were cut."""
    monkeypatch.setattr(ServerEnd, "receive", lambda self, data: self.events.append(str(len(data))))
    with pytest.raises(AssertionError):
        TARGETS["server"](seeds_of("server")[0])


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_a_short_search(target: str, tmp_path: Path) -> None:
    """`python -m tests.fuzz TARGET --minutes 60` goes on for longer, from where the last one ended."""
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("there is no atheris for this Python or machine")
    if target == "image" and shutil.which("qemu-img") is None:
        require_tool("qemu-img", package="qemu-utils")
    found = tmp_path / "found"
    command = [sys.executable, "-m", "tests.fuzz", target, "--minutes", str(SECONDS / 60)]
    ended = subprocess.run(
        [*command, "--kept", str(tmp_path), "--found", str(found)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert ended.returncode == 0, f"{ended.stderr[-4000:]}\nsaved: {[file.read_bytes() for file in found.glob('*')]}"
    assert "stat::number_of_executed_units" in ended.stderr

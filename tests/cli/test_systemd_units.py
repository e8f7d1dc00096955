"""The units in docs/systemd, by the judgement of systemd's own tools."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers import COMMAND_LIMIT_S, ROOT, require_tool, run

UNITS = ROOT / "docs" / "systemd"

MOST_EXPOSED = 20
"""Of 100, as `systemd-analyze security` counts; most services of a distribution have 90."""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units, with a program that is there in the place of /usr/bin/pynbd."""
    require_tool("systemd-analyze", package="systemd")
    for unit in UNITS.iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/bin/pynbd", sys.executable))
    return tmp_path


def verified(*units: Path) -> str:
    """What systemd has to say of units; of what it does not know it says so, and goes on."""
    words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *map(str, units)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=COMMAND_LIMIT_S)
    return done.stdout + done.stderr


def test_the_units_are_what_systemd_takes(installed: Path) -> None:
    units = sorted(installed.iterdir())
    assert [unit.name for unit in units] == ["pynbd.service", "pynbd.socket"]
    assert verified(*units) == ""


def test_a_unit_with_a_mistake_is_not(installed: Path) -> None:
    unit = installed / "pynbd.service"
    unit.write_text(unit.read_text().replace("WatchdogSec=", "WatchdocSec="))
    assert "WatchdocSec" in verified(unit)


def test_the_service_may_do_little(installed: Path) -> None:
    unit = installed / "pynbd.service"
    run("systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}", unit)
    unit.write_text(unit.read_text().replace("ProtectSystem=strict", "").replace("SystemCallFilter=", "#"))
    run("systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED}", unit, status=1)

"""The command as such: what it imports, its help, and how it refuses what it does not know."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pynbd import __version__
from pynbd.cli import VERBS, main
from tests.cli.pynbd_command import PYNBD
from tests.peers import ROOT

HEAVY = ("asyncio", "construct", "logging", "msgspec", "nbd_protocol", "pynbd.block", "rich", "tempfile")


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["serve", "--help"], ["info", "--help"], ["img", "--help"], ["img", "map", "-h"], []],
)
def test_help_imports_nothing_that_is_slow(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom pynbd.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"sys.exit(' '.join(name for name in {HEAVY!r} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.replace("pynbd: the following arguments are required: VERB\n", "")) == (0, "")


NOT_FOR_SMALL_COMMANDS = (
    *("cryptography", "ctypes", "difflib", "json", "nbd_protocol", "pathlib", "rich", "shutil", "tempfile"),
    *("pynbd.crypto.ciphers", "pynbd.crypto.luks", "pynbd.server", "pynbd.storage.aio", "pynbd.storage.nbd"),
    *(f"pynbd.formats.qcow2.{part}" for part in ("bitmaps", "check", "encryption", "snapshots")),
)
"""What takes a good part of the time that a command needs which only looks into the header of an image."""


def test_small_commands_import_what_they_need(tmp_path: Path) -> None:
    image = str(tmp_path / "disk.qcow2")
    for arguments in (["img", "create", "-q", "-f", "qcow2", image, "1G"], ["img", "info", image]):
        program = (
            "import sys\nfrom pynbd.cli import main\n"
            f"before = set(sys.modules)\nstatus = main({arguments!r})\n"
            f"found = set({NOT_FOR_SMALL_COMMANDS!r}) & (set(sys.modules) - before)\n"
            "sys.exit(' '.join(sorted(found)) or status)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), arguments


@pytest.mark.parametrize("verb", ["", "serve"])
def test_help_fits_a_terminal(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"] if verb else ["--help"])
    said = capsys.readouterr().out
    assert end.value.code == 0
    assert max(map(len, said.splitlines())) <= 80
    assert not verb or f"pynbd {verb}" in said


def test_every_verb_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert f"{name} " in said
        assert verb.summary in said


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, capsys.readouterr().out) == (0, f"pynbd {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "pynbd: the following arguments are required: VERB"),
        (["srve"], "pynbd: VERB: invalid choice: 'srve' (choose from"),
        (["--verison", "drivers"], "pynbd: there is no option --verison (did you mean --version?)"),
        (["serve", "--readonly", "x"], "pynbd serve: there is no option --readonly (did you mean --read-only?)"),
        (["serve", "--Q=1", "x"], "pynbd serve: there is no option --Q (see pynbd serve --help)"),
        (["info", "a", "b", "c"], "pynbd info: 'b' is one argument too many (see pynbd info --help)"),
        (["serve", "--read", "x"], "pynbd serve: there is no option --read (did you mean"),
    ],
)
def test_errors_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    assert (end.value.code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(said)


def test_it_is_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "pynbd", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"pynbd {__version__}\n"


def test_names_that_are_no_utf8_are_printed_as_they_are(tmp_path: Path) -> None:
    """A name is bytes; what is printed of it can be pasted."""
    name = os.fsencode(tmp_path) + b"/\xff.raw"
    Path(os.fsdecode(name)).write_bytes(bytes(1 << 20))
    command = [sys.executable, "-m", "pynbd", "serve", "-p", "0", os.fsdecode(name)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C.UTF-8"}) as server:
        try:
            assert server.stdout is not None
            assert name in server.stdout.readline()
        finally:
            server.terminate()
        server.stdout.read()
    assert server.returncode == 0


def test_the_manual_of_serve_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    options = set(re.findall(r"(?<![\w-])--?[a-zA-Z][a-z-]*", capsys.readouterr().out.partition("\nDISK is")[0]))
    manual = (ROOT / "docs" / "serve.md").read_text()
    assert sorted(option for option in options if not re.search(rf"`[^`\n]*(?<![\w-]){option}(?![\w-])", manual)) == [
        "--help",
        "-h",
    ]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str, tmp_path: Path) -> None:
    """The work is done, and what would go to one of them goes nowhere else."""
    command = f'"$@" img convert -p -O raw source.raw copy.raw {closed}'
    (tmp_path / "source.raw").write_bytes(b"x" * (1 << 20))
    ended = subprocess.run(
        ["sh", "-c", command, "sh", *PYNBD], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert (tmp_path / "copy.raw").read_bytes() == b"x" * (1 << 20)
    failing = f'"$@" img info missing.raw {closed}'
    ended = subprocess.run(
        ["sh", "-c", failing, "sh", *PYNBD], cwd=tmp_path, capture_output=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_a_name_that_is_no_text_where_no_errors_are_read() -> None:
    """It is an error like others, with its exit status, though stderr is closed."""
    command = ["sh", "-c", '"$@" img compare "$(printf "b\\377")" missing.raw 2>&-', "sh", *PYNBD]
    ended = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (2, b"")

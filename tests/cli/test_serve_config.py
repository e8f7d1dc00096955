"""What the arguments of `pynbd serve` stand for, and what is said where they make no sense."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pynbd.block.errors import OptionError
from pynbd.cli import make_parser
from pynbd.cli.serve import ELSEWHERE
from pynbd.cli.serve_config import OF_A_DISK, configuration, split_name
from pynbd.server.config import Config, ExportOptions


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def at_end() -> Iterator[contextlib.ExitStack]:
    """What the configuration wants to have cleared away."""
    with contextlib.ExitStack() as stack:
        yield stack


def parsed(*words: str) -> argparse.Namespace:
    """The arguments as `pynbd serve` understands them."""
    return make_parser("serve").parse_args(["serve", *words])


def config(*words: str) -> Config:
    """What they ask for."""
    with contextlib.ExitStack() as stack:
        return configuration(parsed(*words), stack)


def export(*words: str) -> ExportOptions:
    """The only export that they ask for."""
    (found,) = config(*words).exports.values()
    return found


# --- disks and their names ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("disk.raw", (None, "disk.raw")),
        ("a=disk.raw", ("a", "disk.raw")),
        ("vm.root=disk.raw", ("vm.root", "disk.raw")),
        ("a=b=c.raw", ("a", "b=c.raw")),
        ("a=x,y.raw", ("a", "x,y.raw")),
        ("./a=b.raw", (None, "./a=b.raw")),
        ("/a=b.raw", (None, "/a=b.raw")),
        ("x,y=b.raw", (None, "x,y=b.raw")),
        ("=b.raw", (None, "=b.raw")),
        ("a=", (None, "a=")),
        ("nbd+unix:///?socket=/x", (None, "nbd+unix:///?socket=/x")),
        ("a=nbd+unix:///?socket=/x", ("a", "nbd+unix:///?socket=/x")),
        ("driver=raw,file.filename=x", (None, "driver=raw,file.filename=x")),
        ("a=driver=raw,file.filename=x", ("a", "driver=raw,file.filename=x")),
        ('json:{"driver": "null", "x": "="}', (None, 'json:{"driver": "null", "x": "="}')),
        ('a=json:{"driver": "null"}', ("a", 'json:{"driver": "null"}')),
        ("a=./mine.py", ("a", "./mine.py")),
    ],
)
def test_names_of_disks(text: str, found: tuple[str | None, str]) -> None:
    assert split_name(text, image_opts=False) == found


def test_a_file_of_that_very_name_comes_first() -> None:
    Path("a=b.raw").touch()
    assert split_name("a=b.raw", image_opts=False) == (None, "a=b.raw")
    assert split_name("n=a=b.raw", image_opts=False) == ("n", "a=b.raw")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("filename=a.raw", (None, "filename=a.raw")),
        ("file.filename=a.raw,driver=raw", (None, "file.filename=a.raw,driver=raw")),
        ("filename=a.raw,driver=raw", (None, "filename=a.raw,driver=raw")),
        ("n=filename=a.raw", ("n", "filename=a.raw")),
        ("n=driver=raw,file.filename=a.raw", ("n", "driver=raw,file.filename=a.raw")),
        ('n=json:{"driver": "null"}', ("n", 'json:{"driver": "null"}')),
    ],
)
def test_names_beside_image_opts(text: str, found: tuple[str | None, str]) -> None:
    assert split_name(text, image_opts=True) == found


def test_disks_may_stand_between_options() -> None:
    assert list(config("a=x", "-r", "b=y", "-p", "0", "c=z").exports) == ["a", "b", "c"]
    assert list(config("-r", "--", "-x.raw").exports.values()) == [ExportOptions(disk="-x.raw", read_only=True)]


# --- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["-f", "raw"], {"format": "raw"}),
        (["--format=raw"], {"format": "raw"}),
        (["-r"], {"read_only": True}),
        (["-s"], {"snapshot": True}),
        (["-o", "1M"], {"offset": 1 << 20}),
        (["-n"], {"cache": "none"}),
        (["--cache", "unsafe"], {"cache": "unsafe"}),
        (["--cache=writethrough"], {"cache": "writethrough"}),
        (["--aio", "io_uring"], {}),
        (["--discard", "unmap"], {"discard": "unmap"}),
        (["--detect-zeroes=unmap"], {"detect_zeroes": "unmap"}),
        (["--filter", "nofilter", "--filter=delay,read=1ms"], {"filters": ("nofilter", "delay,read=1ms")}),
        (["-D", "what it is"], {"description": "what it is"}),
        (["-A"], {"allocation_depth": True}),
        (["-B", "x", "-B", "y"], {"bitmaps": ("x", "y")}),
        (["-t", "-q", "-vv", "--exit-last"], {}),
        (["-rsA"], {"read_only": True, "snapshot": True, "allocation_depth": True}),
    ],
)
def test_options_of_disks(words: list[str], expected: dict[str, object]) -> None:
    assert export(*words, "x.raw") == ExportOptions(disk="x.raw", **expected)  # type: ignore[arg-type]  # as given above


def test_image_opts() -> None:
    assert export("--image-opts", "driver=null,size=1M").disk == {"driver": "null", "size": "1M"}
    assert export("--image-opts", 'json:{"driver": "null"}').disk == {"driver": "null"}


@pytest.mark.parametrize(
    ("words", "listen"),
    [
        ([], ("127.0.0.1:10809",)),
        (["-p", "0"], ("127.0.0.1:0",)),
        (["-b", "0.0.0.0"], ("0.0.0.0:10809",)),
        (["-b", "::1", "-b", "localhost", "-p", "7"], ("[::1]:7", "localhost:7")),
        (["-b", ""], (":10809",)),
        (["-k", "/x/s"], ("unix:/x/s",)),
        (["-k", "/x/s", "-p", "7"], ("unix:/x/s", "127.0.0.1:7")),
        (["--vsock", "7", "--vsock", "3:8"], ("vsock:7", "vsock:3:8")),
        (["--vsock", "7", "-p", "7"], ("127.0.0.1:7", "vsock:7")),
        (["-k", "/x/s", "--run", "true"], ("unix:/x/s",)),
    ],
)
def test_where_it_listens(words: list[str], listen: tuple[str, ...]) -> None:
    assert config(*words, "x").server.listen == listen


def test_sockets_are_named_in_full(tmp_path: Path) -> None:
    assert config("-k", "s", "x").server.listen == (f"unix:{tmp_path}/s",)


def test_run_listens_on_a_socket_that_goes_with_it(at_end: contextlib.ExitStack) -> None:
    (listen,) = configuration(parsed("--run", "true", "x"), at_end).server.listen
    folder = Path(listen.removeprefix("unix:")).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    at_end.close()
    assert not folder.exists()


def test_clients() -> None:
    assert config("-e", "3", "x").server.max_clients == 3
    assert config("x").server.max_clients == 0


def test_a_file_and_the_command_line_together() -> None:
    Path("c.toml").write_text('[server]\nlisten = ["h:1"]\nmax-clients = 5\n[export.a]\ndisk = "x"\n')
    both = config("--config", "c.toml", "-r", "b=y")
    assert both.exports == {"a": ExportOptions(disk="x"), "b": ExportOptions(disk="y", read_only=True)}
    assert (both.server.listen, both.server.max_clients) == (("h:1",), 5)
    other = config("--config", "c.toml", "-p", "7", "-e", "9")
    assert (other.server.listen, other.server.max_clients) == (("127.0.0.1:7",), 9)


# --- what makes no sense --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to serve: give a DISK, or a --config"),
        (["a", "b"], "several disks need names: give NAME=a"),
        (["x=a", "b"], "several disks need names: give NAME=b"),
        (["x=a", "x=b"], "there are two exports named 'x'"),
        (["-x", "n", "x=a", "y=b"], "-x names one DISK"),
        (["-x", "n"], "-x names one DISK"),
        (["-x", "n", "x=a"], "-x n and x=a: the export has two names"),
        (["--fork", "--run", "x", "a"], "--fork and --run don't go together"),
        (["-o", "x", "a"], "--offset: 'x' is no size"),
        (["-o", "-1", "a"], "--offset: '-1' is no size"),
        (["-k", "", "a"], "-k: an empty path"),
        (["-k", "/" + "x" * 107, "a"], "1 to 107 bytes, none of them NUL; this one has 108"),
        (["-f", "rwa", "a"], "driver 'rwa' is unknown (did you mean 'raw'?)"),
        (["--filter", "dealy", "a"], "--filter: driver 'dealy' is unknown (did you mean 'delay'?)"),
        (["--filter", "delay,raed=1", "a"], "--filter: raed: driver 'delay' has no such option (did you mean 'read'?)"),
        (["--filter", "memory,size=1M", "a"], "--filter: driver 'memory' is no filter; there are: blkdebug, delay"),
        (["-B", "", "a"], "-B: bitmap name '': its length must be 1 to 1023 bytes"),
        (["-x", "\udcff", "a"], r"the export's name: '\udcff' is no UTF-8"),
        (["-D", "\udcff", "a"], r"-D: '\udcff' is no UTF-8"),
        (["--image-opts", "a.raw"], "'a.raw': expected KEY=VALUE"),
        (
            ["driver=raw,file.driver=file,file.drvier=file,file.filename=x"],
            "file.drvier: driver 'file' has no such option",
        ),
        (['json:{"driver": '], "json: "),
        (["./missing.py"], "./missing.py: no such file"),
        (["--config", "missing.toml"], "missing.toml: No such file or directory"),
        ([""], "an empty file name"),
    ],
)
def test_what_makes_no_sense(words: list[str], said: str) -> None:
    with pytest.raises(OptionError) as refused:
        config(*words)
    assert said in str(refused.value)


def test_what_is_wrong_in_a_file_is_told_with_the_file() -> None:
    Path("c.toml").write_text('[export.a]\ndisk = "x"\nfilters = ["dealy"]\n')
    with pytest.raises(OptionError, match=r"^c\.toml: export\.a\.filters\.0: driver 'dealy' is unknown"):
        config("--config", "c.toml")


@pytest.mark.parametrize("name", OF_A_DISK)
def test_flags_that_would_be_said_in_vain(name: str) -> None:
    """`--config FILE -r` must not serve something writable."""
    Path("c.toml").write_text('[export.a]\ndisk = "x"\n')
    values = {"format": "raw", "offset": "1M", "cache": "none", "discard": "unmap", "detect_zeroes": "on"}
    values |= {"filter": "nofilter", "description": "d", "bitmap": "b", "load_snapshot": "s", "access": "unix"}
    flag = OF_A_DISK[name]
    words = [flag, values[name]] if name in values else [flag]
    with pytest.raises(OptionError, match=f"^{flag} is said of a DISK"):
        config("--config", "c.toml", *words)
    assert config(*words, "driver=raw,file.filename=x").exports


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-p", "text", "a"], "-p/--port: 'text' is no port (0 to 65535)"),
        (["-p", "65536", "a"], "-p/--port: '65536' is no port"),
        (["-p", "-1", "a"], "-p/--port: '-1' is no port"),
        (["-p", "٣", "a"], "is no port"),
        (["-e", "-3", "a"], "-e/--shared: '-3' is no number of clients"),
        (["-e", "9" * 5000, "a"], "is no number of clients"),
        (["--discard", "maybe", "a"], "--discard: invalid choice: 'maybe'"),
        (["-n", "--cache", "none", "a"], "--cache: not allowed with argument -n/--nocache"),
        (["-L"], "`pynbd list URI`"),
        (["--list", "-k", "x"], "`pynbd list URI`"),
        (["-c", "/dev/nbd0", "a"], "nbd-client HOST PORT /dev/nbdX"),
        (["--connect=/dev/nbd0", "a"], "nbd-client HOST PORT /dev/nbdX"),
        (["-d", "/dev/nbd0"], "`nbd-client -d /dev/nbdX`"),
        (["--tls-hostname=x", "a"], "it is for clients"),
        *[([names[-1], "x"], text) for names, text in ELSEWHERE.items()],
    ],
)
def test_arguments_that_can_not_be_understood(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parsed(*words)
    err = capsys.readouterr().err
    assert (end.value.code, err.count("\n")) == (1, 1)
    assert err.startswith("pynbd serve: ")
    assert said in err


def test_objects_of_the_file_come_before_those_of_the_command_line() -> None:
    Path("c.toml").write_text(
        '[[object]]\nqom-type = "secret"\nid = "a"\ndata = "x"\n[export.e]\ndisk = "driver=null"\n'
    )
    found = config("--config", "c.toml", "--object", "secret,id=b,data=y").objects
    assert [(tree["id"], tree["data"]) for tree in found] == [("a", "x"), ("b", "y")]

"""Variables of the environment that say what the command line of `pynbd serve` does not."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path

import pytest

from pynbd.cli import make_parser
from pynbd.cli.serve import ELSEWHERE
from pynbd.cli.serve_config import configuration
from tests import peers
from tests.conftest import DiskMaker


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PYNBD_"):
            monkeypatch.delenv(name)


def serve_arguments(*words: str) -> argparse.Namespace:
    """What `pynbd serve WORDS` would be told."""
    return make_parser("serve").parse_args(["serve", *words])


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of it instead."""
    with pytest.raises(SystemExit) as ended:
        serve_arguments(*words)
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_without_variables_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable says nothing, and the defaults are those of a command line that says nothing."""
    plain, nothing = serve_arguments("disk.raw"), serve_arguments()
    monkeypatch.setenv("PYNBD_SERVE_FORMAT", "")
    assert (serve_arguments("disk.raw"), serve_arguments()) == (plain, nothing)


def test_each_kind_of_option(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "DISK": "a=/data/a.raw 'b=/data/b c.raw'",
        "PORT": "10810",
        "READ_ONLY": "on",
        "SNAPSHOT": "off",
        "FILTER": "nofilter delay,read=5ms",
        "EXPORT_NAME": "two words",
        "CACHE": "none",
        "VERBOSE": "2",
        "QUIET": "TRUE",
    }
    for name, value in said.items():
        monkeypatch.setenv(f"PYNBD_SERVE_{name}", value)
    found = serve_arguments()
    assert found.disk == ["a=/data/a.raw", "b=/data/b c.raw"]
    assert (found.port, found.read_only, found.snapshot, found.cache) == (10810, True, False, "none")
    assert (found.filter, found.export_name) == (["nofilter", "delay,read=5ms"], "two words")
    assert (found.verbose, found.quiet, found.fork, found.default_bind) == (2, True, False, "127.0.0.1")


def test_the_command_line_replaces_what_variables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYNBD_SERVE_DISK", "a.raw")
    monkeypatch.setenv("PYNBD_SERVE_PORT", "10810")
    monkeypatch.setenv("PYNBD_SERVE_BIND", "0.0.0.0 ::")
    monkeypatch.setenv("PYNBD_SERVE_DESCRIPTION", "stays")
    found = serve_arguments("-b", "localhost", "b.raw", "-p", "10811", "c.raw")
    assert (found.disk, found.bind, found.port) == (["b.raw", "c.raw"], ["localhost"], 10811)
    assert found.description == "stays"


def test_an_option_that_excludes_another_replaces_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who we are is said by a folder, a file or an object; the command line's word goes before the variable's."""
    monkeypatch.setenv("PYNBD_SERVE_TLS_CERTIFICATES", "/pki")
    monkeypatch.setenv("PYNBD_SERVE_TLS_VERIFY_PEER", "yes")
    found = serve_arguments("--tls-psk", "keys.psk")
    assert (found.tls_psk, found.tls_certificates, found.tls_verify_peer) == ("keys.psk", None, True)


def test_rules_of_variables_have_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that fits decides: who is denied stays out, whatever else is allowed."""
    monkeypatch.setenv("PYNBD_SERVE_ALLOW", "all")
    monkeypatch.setenv("PYNBD_SERVE_DENY", "10.0.0.66 10.0.0.67")
    monkeypatch.setenv("PYNBD_SERVE_ALLOW_READ_ONLY", "10.0.0.0/8")
    rules = [("deny", "10.0.0.66"), ("deny", "10.0.0.67"), ("read-only", "10.0.0.0/8"), ("allow", "all")]
    assert serve_arguments("-r").access == rules
    assert serve_arguments("--allow", "unix").access == [("allow", "unix")]


def test_every_option_has_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """All long options but those that are not here; a variable that stands for none is refused."""
    parser = make_parser("serve")
    plain = serve_arguments()
    (verbs,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    elsewhere = {name for names in ELSEWHERE for name in names}
    flags = {flag for flag in verbs.choices["serve"]._option_string_actions if flag.startswith("--")}
    tried = 0
    for action in verbs.choices["serve"]._actions:
        flag = next((flag for flag in action.option_strings if flag in flags - elsewhere - {"--help"}), "")
        if flag:
            name = f"PYNBD_SERVE_{flag.removeprefix('--').replace('-', '_').upper()}"
            monkeypatch.setenv(name, next((word for word in action.choices or ["1"] if word != action.default), ""))
            assert getattr(serve_arguments(), action.dest) != getattr(plain, action.dest), name
            monkeypatch.delenv(name)
            tried += 1
    assert tried > 40


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"PORT": "x"}, "PYNBD_SERVE_PORT: 'x' is no port (0 to 65535)"),
        ({"CACHE": "some"}, "PYNBD_SERVE_CACHE: invalid choice: 'some'"),
        ({"PROT": "1"}, "PYNBD_SERVE_PROT: there is no such option (did you mean PYNBD_SERVE_PORT?)"),
        ({"CONNECT": "/dev/nbd0"}, "PYNBD_SERVE_CONNECT: there is no such option"),
        ({"READ_ONLY": "perhaps"}, "PYNBD_SERVE_READ_ONLY: 'perhaps' is neither on nor off"),
        ({"READ_ONLY": "2"}, "PYNBD_SERVE_READ_ONLY: '2' is neither on nor off"),
        ({"DISK": "'a.raw"}, "PYNBD_SERVE_DISK: No closing quotation"),
        ({"TLS_PSK": "a", "TLS_CREDS": "b"}, "PYNBD_SERVE_TLS_PSK: not allowed with PYNBD_SERVE_TLS_CREDS"),
    ],
)
def test_what_is_wrong_is_said_of_the_variable(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"PYNBD_SERVE_{name}", value)
    assert refusal(capsys).startswith(f"pynbd serve: {words}")


def test_what_is_wrong_on_the_command_line_is_said_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYNBD_SERVE_PORT", "10810")
    assert refusal(capsys, "-p", "y") == "pynbd serve: -p/--port: 'y' is no port (0 to 65535)\n"
    assert "there is no option --prot" in refusal(capsys, "--prot", "1")


def test_other_verbs_do_not_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYNBD_SERVE_PROT", "1")
    assert make_parser("info").parse_args(["info", "nbd://localhost"]).uri == "nbd://localhost"


def test_a_server_made_by_variables_alone(make_disk: DiskMaker) -> None:
    disk = make_disk(1 << 20)
    variables = {"PYNBD_SERVE_DISK": f"d={disk}", "PYNBD_SERVE_READ_ONLY": "on", "PYNBD_SERVE_DESCRIPTION": "by name"}
    with peers.pynbd_serve(env=variables) as peer:
        (export,) = json.loads(peers.run("nbdinfo", "--json", "--list", peer.uri("")))["exports"]
    assert (export["export-name"], export["description"], export["is_read_only"]) == ("d", "by name", True)


def test_where_it_listens_if_nothing_says_it(tmp_path: Path, make_disk: DiskMaker) -> None:
    """--default-bind is for images: neither -b nor the addresses of a configuration file give way to it."""
    config = tmp_path / "pynbd.toml"
    config.write_text(f'[server]\nlisten = ["127.0.0.1:0"]\n[export.d]\ndisk = "{make_disk(1 << 20)}"\n')

    def listens(*words: str) -> tuple[str, ...]:
        with contextlib.ExitStack() as at_end:
            return configuration(serve_arguments(*words), at_end).server.listen

    default = ("--default-bind", "0.0.0.0")
    assert listens("driver=null,size=1M") == ("127.0.0.1:10809",)
    assert listens(*default, "driver=null,size=1M") == ("0.0.0.0:10809",)
    assert listens(*default, "-p", "10810", "driver=null,size=1M") == ("0.0.0.0:10810",)
    assert listens("--default-bind", "::", "driver=null,size=1M") == ("[::]:10809",)
    assert listens(*default, "-b", "localhost", "driver=null,size=1M") == ("localhost:10809",)
    assert listens(*default, "-k", "/run/s", "driver=null,size=1M") == ("unix:/run/s",)
    assert listens(*default, "--config", str(config)) == ("127.0.0.1:0",)
    config.write_text(config.read_text().replace("listen", "# listen"))
    assert listens(*default, "--config", str(config)) == ("0.0.0.0:10809",)

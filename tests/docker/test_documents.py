"""What docker/ and docs/containers.md say, against pynbd itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pynbd.cli import make_parser
from pynbd.server import config as configs
from pynbd.server.check import check
from tests.peers import ROOT

PAGE = ROOT / "docs/containers.md"

FILES = [
    PAGE,
    ROOT / "docs/serve.md",
    *(ROOT / "docker" / name for name in ("Dockerfile", "compose.yaml", "kubernetes.yaml")),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_variable_stands_for_an_option(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set(re.findall(r"\bPYNBD_SERVE_[A-Z_]+[A-Z]\b", path.read_text()))
    assert names
    for name in names:
        value = {"PYNBD_SERVE_CACHE": "none", "PYNBD_SERVE_DISCARD": "unmap"}.get(name, "1")
        monkeypatch.setenv(name, value)
    make_parser("serve").parse_args(["serve"])


def test_configuration_files_are_right(tmp_path: Path) -> None:
    """Those in the page, and the one in the manifest."""
    page = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    manifest = (ROOT / "docker/kubernetes.yaml").read_text().partition("pynbd.toml: |\n")[2].partition("---")[0]
    assert page
    for text in [*page, re.sub(r"^    ", "", manifest, flags=re.M)]:
        path = tmp_path / "pynbd.toml"
        path.write_text(text)
        check(configs.load(str(path)))


def test_the_page_shows_files_that_are_there() -> None:
    named = set(re.findall(r"\bdocker/[\w.]+", PAGE.read_text()))
    assert named >= {"docker/Dockerfile", "docker/compose.yaml", "docker/kubernetes.yaml"}
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_only_what_the_wheel_is_made_of_goes_to_the_builder() -> None:
    """Everything that the Dockerfile copies from outside is let in by .dockerignore, and nothing else is."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    copied = set()
    for words in re.findall(r"^COPY (?!--from)(.*)$", (ROOT / "docker/Dockerfile").read_text(), re.M):
        copied.update(words.split()[:-1])
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied
    assert "*" in lines

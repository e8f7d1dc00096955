"""The three framings of the transmission phase, as a server can be told to offer them."""

from __future__ import annotations

from pathlib import Path

FRAMINGS = ("simple", "structured", "extended")
"""Simple replies; structured replies; extended headers. A server that offers one offers those before it, too."""


def framing_options(framing: str, folder: Path) -> list[str]:
    """Options of `pynbd serve` that leave no more than a framing; the file they name is written to `folder`."""
    config = folder / f"{framing}.toml"
    structured = str(framing != "simple").lower()
    extended = str(framing == "extended").lower()
    config.write_text(f"[server]\nstructured-replies = {structured}\nextended-headers = {extended}\n")
    return ["--config", str(config)]

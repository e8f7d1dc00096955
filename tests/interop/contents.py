"""Checksums of disks, and random data: files' own, never held in memory whole."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

STEP_BYTES = 1 << 20


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_random(path: Path, size_bytes: int) -> Path:
    """Make a file of random data, and return its path."""
    with path.open("wb") as file:
        for _ in range(size_bytes // STEP_BYTES):
            file.write(os.urandom(STEP_BYTES))
    return path


def is_all_zero(path: Path) -> bool:
    """Whether a file holds nothing but zeroes."""
    zeroes = bytes(STEP_BYTES)
    with path.open("rb") as file:
        while block := file.read(STEP_BYTES):
            if block != zeroes[: len(block)]:
                return False
    return True

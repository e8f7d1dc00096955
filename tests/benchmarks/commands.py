"""Commands about image files, `pynbd img` and `qemu-img`: what is run, on what, and what that gives."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks.image_files import ImageFiles
from tests.benchmarks.loads import Client, Place, Sample
from tests.peers import SYSTEM_PATH, CommandError, require_tool, run

LIMIT_S = 300.0
"""What takes longer has hung."""

OUTPUT = "OUTPUT"
"""In the words of a command: the file that it writes. Other words in capitals are names of `ImageFiles`."""


@dataclass(frozen=True)
class Tool:
    """A program with the verbs of qemu-img: how its command line begins, and variables for its environment."""

    words: Sequence[str]
    environment: Mapping[str, str]


@dataclass(frozen=True)
class ImgCommand:
    """One verb, with its arguments, from the start of the process to its end.

    Args:
        words: the verb and what follows. `OUTPUT` stands for the file that is written, the name of a method of
            `ImageFiles` in capitals for that file.
        of_data: whether the figure is how much of the source's disk is dealt with in a second; else it is the time.
    """

    words: tuple[str, ...]
    of_data: bool = False
    client: Client = Client.NOBODY

    @property
    def unit(self) -> str:
        """What is counted."""
        return "MB/s" if self.of_data else "ms"

    @property
    def higher_is_better(self) -> bool:
        """Speed is good, time is not."""
        return self.of_data

    def sources(self, files: ImageFiles) -> list[Path]:
        """The files that are read, made if need be."""
        return [found for word in self.words if (found := _file(word, files)) and word != OUTPUT]

    def measure(self, place: Place) -> Sample:
        """Not on a server: see `run`."""
        raise TypeError(f"{self.words[0]} is no load for the server {place.peer.name}")

    def run(self, tool: Tool, files: ImageFiles, *, cpus: str = "") -> Sample:
        """Run it, and leave what it wrote in `files.output`.

        An output that is there already goes right before. So the second run of a command that writes a disk has, for
        the page cache, the memory that the first one's output was in. Other memory may be none yet: the host of a
        virtual machine has to find it when it is used, which can take three times as long as the command.

        Args:
            tool: by which program.
            files: on what.
            cpus: the processors that it is confined to.

        Raises:
            CommandError: it failed.
        """
        pinned = ["taskset", "--cpu-list", cpus] if cpus else []
        command = [*pinned, *self.command(tool, files)]
        disk_bytes = _disk_bytes(files, self) if self.of_data else None
        if disk_bytes is not None:
            os.sync()  # or it pays for what the one before it has left to be written
        files.output.unlink(missing_ok=True)
        elapsed_s, cpu_s = _timed(command, tool.environment)
        return Sample(
            elapsed_s * 1e3 if disk_bytes is None else disk_bytes / elapsed_s / 1e6,
            requests=None if disk_bytes is None else disk_bytes >> 20,
            transferred_bytes=disk_bytes,
            cpu_s=cpu_s,
        )

    def command(self, tool: Tool, files: ImageFiles) -> list[str]:
        """The command line."""
        return [*tool.words, *(str(_file(word, files) or word) for word in self.words)]

    def check_output(self, files: ImageFiles) -> None:
        """See that what was written is what it should be.

        Raises:
            CommandError: it is not.
        """
        if not files.output.exists():
            return
        qemu_img, written = require_tool("qemu-img"), self._option("-O") or self._option("-f")
        if written == "qcow2":
            run(qemu_img, "check", "-q", "-f", written, files.output)
        for source in self.sources(files):
            run(qemu_img, "compare", "-q", "-f", self._option("-f"), "-F", written, source, files.output)

    def _option(self, name: str) -> str:
        return self.words[self.words.index(name) + 1] if name in self.words else ""


def _file(word: str, files: ImageFiles) -> Path | None:
    """The file that a word stands for."""
    made: dict[str, Callable[[], Path]] = {
        "HALF_SPARSE": files.half_sparse,
        "HALF_SPARSE_IMAGE": files.half_sparse_image,
        "TEXT": files.text,
        "ZLIB_IMAGE": partial(files.text_image, "zlib"),
        "ZSTD_IMAGE": partial(files.text_image, "zstd"),
        "ALLOCATED_IMAGE": files.allocated_image,
        OUTPUT: lambda: files.output,
    }
    return made[word]() if word in made else None


def _disk_bytes(files: ImageFiles, command: ImgCommand) -> int:
    """The length of the disk that is copied."""
    of_text = {"TEXT", "ZLIB_IMAGE", "ZSTD_IMAGE"}.intersection(command.words)
    return files.text_bytes if of_text else files.half_sparse_bytes


def _timed(command: Sequence[str], environment: Mapping[str, str]) -> tuple[float, float]:
    """(seconds, processor seconds) of a command.

    Raises:
        CommandError: it failed.
    """
    with tempfile.TemporaryFile() as told:
        begun_s = time.perf_counter()
        variables = {**os.environ, "PATH": SYSTEM_PATH, "LC_ALL": "C.UTF-8", **environment}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=told, env=variables)
        guard = threading.Timer(LIMIT_S, process.kill)
        guard.start()
        try:
            _, status, used = os.wait4(process.pid, 0)
        finally:
            guard.cancel()
        elapsed_s = time.perf_counter() - begun_s
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise CommandError(f"{' '.join(command)}: status {process.returncode}: {told.read().decode()}")
    # Its peak of memory can't be had: what the kernel tells begins with that of this process, from before the exec.
    return elapsed_s, used.ru_utime + used.ru_stime

"""A Debian guest under QEMU's software emulation, driven over its serial console."""

from __future__ import annotations

import contextlib
import io
import itertools
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pexpect
from pexpect import fdpexpect

from tests.attach.kernel import Kernel
from tests.peers import require_tool

HOST_ADDRESS = "10.0.2.2"
"""The guest reaches 127.0.0.1 of the machine that runs it under this address (QEMU's user network)."""

MEMORY_MIB = 512
BOOT_TIMEOUT_S = 90
COMMAND_TIMEOUT_S = 60
POWEROFF_TIMEOUT_S = 30
TRANSCRIPT_SHOWN_CHARS = 12_000

SHELL_READY = r"<guest shell ready>\r?\n"
KERNEL_OPTIONS = (
    "console=ttyS1 loglevel=5 panic=-1 mitigations=off tsc=reliable random.trust_cpu=on 8250.nr_uarts=2 "
    "cryptomgr.notests"
)


class GuestError(Exception):
    """The guest did not boot, was lost, or did not answer in time; carries the console and the kernel's log."""


class CommandFailedError(GuestError):
    """A command in the guest ended with a status other than 0."""

    def __init__(self, command: str, status: int, output: str, transcript: str) -> None:
        super().__init__(f"exit {status} from: {command}\n{transcript}")
        self.status = status
        self.output = output


class Guest:
    """One running guest: a shell on the first serial port, the kernel's messages on the second.

    `drives` are values of QEMU's `-drive` option. Console, kernel log and QEMU's messages are kept in `run_dir`.
    Used as a context manager; leaving it ends QEMU whatever state the guest is in.
    """

    def __init__(self, kernel: Kernel, initramfs: Path, run_dir: Path, drives: Sequence[str] = ()) -> None:
        self._transcript = io.StringIO()
        self._kernel_log_path = run_dir / "kernel.log"
        self._qemu_log_path = run_dir / "qemu.log"
        self._tokens = itertools.count(1)
        self._usable = False
        self._console_socket, qemu_end = socket.socketpair()
        argv = [
            *("setpriv", "--pdeathsig", "KILL"),
            *_qemu_command(kernel, initramfs, self._kernel_log_path, qemu_end.fileno()),
            *itertools.chain.from_iterable(("-drive", drive) for drive in drives),
        ]
        with qemu_end, self._qemu_log_path.open("wb") as log:
            self._qemu = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[qemu_end.fileno()]
            )
        self._console: Any = fdpexpect.fdspawn(
            self._console_socket.fileno(), encoding="utf-8", codec_errors="replace", use_poll=True
        )
        self._console.delaybeforesend = None
        self._console.logfile_read = self._transcript

    def __enter__(self) -> Self:
        try:
            self._expect([SHELL_READY], BOOT_TIMEOUT_S, "boot")
        except BaseException:
            self.close()
            raise
        self._usable = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def usable(self) -> bool:
        """Whether the shell answers; False after a time-out or a lost guest."""
        return self._usable and self._qemu.poll() is None

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """Run shell `command` (several lines are allowed) in the guest's one shell; return its output and errors.

        Raises `CommandFailedError` when its status is not 0, and `GuestError` when it does not end within `timeout_s`
        or the shell or the guest goes away; after that the guest is not usable any more.
        """
        status, output = self.status_of(command, timeout_s)
        if status != 0:
            raise CommandFailedError(command, status, output, self.evidence())
        return output

    def status_of(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
        """Run `command` like `run`, but return its exit status with its output instead of raising for it."""
        if not self.usable:
            raise GuestError(f"the guest is not usable; not run: {command}\n{self.evidence()}")
        self._usable = False
        marker = f"<end of command {next(self._tokens)}: "
        self._transcript.write(f"$ {command}\n")
        self._console.send(f"{{ {command}\n}} </dev/null 2>&1; echo '{marker}'$?'>'\n")
        if self._expect([marker + r"(\d+)>\r?\n", SHELL_READY], timeout_s, command) == 1:
            raise GuestError(f"the guest's shell ended in: {command}\n{self.evidence()}")
        self._usable = True
        return int(self._console.match[1]), self._console.before.replace("\r\n", "\n")

    def kernel_log(self) -> str:
        """Return the messages of level warning and above that the guest's kernel printed so far."""
        if not self._kernel_log_path.exists():
            return ""
        return self._kernel_log_path.read_text(errors="replace").replace("\r\n", "\n")

    def evidence(self) -> str:
        """Return what a person needs to see why something failed: console, kernel log, QEMU's messages."""
        qemu_log = self._qemu_log_path.read_text(errors="replace")
        parts = (("console", self._transcript.getvalue()), ("kernel log", self.kernel_log()), ("QEMU", qemu_log))
        return "\n".join(f"--- {name} ---\n{text[-TRANSCRIPT_SHOWN_CHARS:]}" for name, text in parts)

    def power_off(self) -> None:
        """Let the guest turn itself off and wait for QEMU to close its disks and end with status 0."""
        self._transcript.write("$ poweroff -f\n")
        self._usable = False
        self._console.send("sync; poweroff -f\n")
        try:
            status = self._qemu.wait(POWEROFF_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise GuestError(f"the guest did not power off in {POWEROFF_TIMEOUT_S} s\n{self.evidence()}") from None
        if status != 0:
            raise GuestError(f"QEMU ended with status {status}\n{self.evidence()}")

    def close(self) -> None:
        """End QEMU and free its console; may be called again."""
        self._usable = False
        if self._qemu.poll() is None:
            self._qemu.kill()
        self._qemu.wait()
        with contextlib.suppress(OSError):  # closed before
            self._console_socket.close()

    def _expect(self, patterns: list[str], timeout_s: float, doing: str) -> int:
        try:
            index: int = self._console.expect(patterns, timeout=timeout_s)
        except pexpect.TIMEOUT:
            raise GuestError(f"not done after {timeout_s} s: {doing}\n{self.evidence()}") from None
        except (pexpect.EOF, OSError):
            raise GuestError(f"the guest was lost in: {doing}\n{self.evidence()}") from None
        return index


def _qemu_command(kernel: Kernel, initramfs: Path, kernel_log: Path, console_fd: int) -> list[str]:
    """Never by /dev/kvm: where it exists it may not work, and what is tested does not depend on the machine."""
    return [
        require_tool("qemu-system-x86_64", package="qemu-system-x86"),
        *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB)),
        *("-nodefaults", "-display", "none", "-no-reboot"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-chardev", f"file,id=kernel,path={kernel_log}", "-serial", "chardev:kernel"),
        *("-kernel", str(kernel.vmlinux), "-initrd", str(initramfs), "-append", KERNEL_OPTIONS),
        *("-netdev", "user,id=n0,restrict=off", "-device", "virtio-net-pci,romfile=,netdev=n0"),
    ]

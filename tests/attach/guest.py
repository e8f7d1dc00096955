"""A Debian guest under QEMU's software emulation, driven over its serial console."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import re
import shlex
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

import pexpect
from pexpect import fdpexpect

from tests.attach.kernel import Kernel
from tests.attach.monitor import Monitor, MonitorError
from tests.attach.watching import watcher
from tests.peers import require_tool

HOST_ADDRESS = "10.0.2.2"
"""The guest reaches 127.0.0.1 of the machine that runs it under this address (QEMU's user network)."""

MEMORY_MIB = 512
BOOT_TIMEOUT_S = 90
COMMAND_TIMEOUT_S = 60
POWEROFF_TIMEOUT_S = 30
TRANSCRIPT_SHOWN_CHARS = 12_000

QEMU_END_TIMEOUT_S = 1
MIGRATION_BYTES_PER_S = 1 << 40
"""No limit; QEMU's own is made for networks."""

PLUMBING = re.compile(r"<end of command \d+: \d+>\n?")
"""What only the harness wants to see on the console."""

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


class Transcript(io.StringIO):
    """What the console said, kept; and shown to a person who watches, as it comes."""

    def __init__(self, shown_to: TextIO | None) -> None:
        super().__init__()
        self._shown_to = shown_to
        self._begun = ""

    def write(self, text: str) -> int:
        if self._shown_to is not None:
            whole, newline, self._begun = (self._begun + text).rpartition("\n")
            self._shown_to.write(PLUMBING.sub("", (whole + newline).replace("\r\n", "\n")))
            self._shown_to.flush()
        return super().write(text)


class Guest:
    """One running guest: a shell on the first serial port, the kernel's messages on the second, QEMU's monitor.

    `options` are further options of QEMU. A guest that is `arriving` does not boot: it waits for the state of another
    one, which must have been started with the same options, by `restore` or by the other's `move_to`. Console, kernel
    log and QEMU's messages are kept in `run_dir`. Used as a context manager; leaving it ends QEMU whatever state the
    guest is in.
    """

    def __init__(
        self,
        kernel: Kernel,
        initramfs: Path,
        run_dir: Path,
        options: Sequence[str] = (),
        *,
        arriving: bool = False,
    ) -> None:
        self._transcript = Transcript(watcher())
        self._run_dir = run_dir
        self._arriving = arriving
        self._kernel_log_path = run_dir / "kernel.log"
        self._qemu_log_path = run_dir / "qemu.log"
        self._tokens = itertools.count(1)
        self._usable = False
        self._console_socket, console_end = socket.socketpair()
        self._monitor_socket, monitor_end = socket.socketpair()
        argv = [
            *("setpriv", "--pdeathsig", "KILL"),
            *_qemu_command(kernel, initramfs, self._kernel_log_path, console_end.fileno(), monitor_end.fileno()),
            *(("-incoming", "defer") if arriving else ()),
            *options,
        ]
        with console_end, monitor_end, self._qemu_log_path.open("wb") as log:
            self._qemu = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[console_end.fileno(), monitor_end.fileno()],
            )
        self.monitor = Monitor(self._monitor_socket)
        self._console: Any = fdpexpect.fdspawn(
            self._console_socket.fileno(), encoding="utf-8", codec_errors="replace", use_poll=True
        )
        self._console.delaybeforesend = None
        self._console.logfile_read = self._transcript

    def __enter__(self) -> Self:
        try:
            with self._losses("boot"):
                self.monitor.negotiate()
            if not self._arriving:
                self.wait_until_booted()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def console(self) -> socket.socket:
        """The guest's first serial port, for a person; not while `run` runs."""
        return self._console_socket

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

    def wait_until_booted(self) -> None:
        """Return when the shell is ready: at the start, and after a reboot."""
        self._expect([SHELL_READY], BOOT_TIMEOUT_S, "boot")
        self._usable = True

    def put_file(self, path: str, content: bytes) -> None:
        """Write `content` to the file `path` in the guest, over the console; for small files."""
        self.run(f"base64 -d >{path} <<'END'\n{base64.encodebytes(content).decode()}END")

    def save(self, state: Path) -> None:
        """Write the state of the machine to the file `state`; it does not run any more then."""
        with self._losses("save"):
            self._usable = False
            self.monitor.execute("stop")
            self._migrate(f"exec:cat >{shlex.quote(str(state))}")

    def restore(self, state: Path) -> None:
        """Become the guest that was saved to `state`, of which this one needs all options; its clock is set right."""
        with self._losses("restore"):
            self.monitor.execute("migrate-incoming", uri=f"exec:cat {shlex.quote(str(state))}")
            self.monitor.wait_until_migrated()
            self.monitor.execute("cont")
        self._usable = True
        self.run(f"date -u -s @{time.time():.0f}")

    def move_to(self, other: Guest) -> None:
        """Move the guest, running, to `other`, which was `arriving`; its shell goes on there."""
        uri = f"unix:{self._run_dir / 'migration.sock'}"
        with self._losses("move"):
            other.monitor.execute("migrate-incoming", uri=uri)
            self._migrate(uri)
            other.monitor.wait_until_migrated()
        self._usable, other._usable = False, True

    def _migrate(self, uri: str) -> None:
        self.monitor.execute("migrate-set-parameters", **{"max-bandwidth": MIGRATION_BYTES_PER_S})
        self.monitor.execute("migrate", uri=uri)
        self.monitor.wait_until_migrated()

    def reboot(self) -> None:
        """Let the guest start anew on the same machine, and wait until its shell is ready."""
        self._usable = False
        self._transcript.write("$ reboot -f\n")
        with self._losses("reboot"):
            self.monitor.execute("set-action", reboot="reset")
            self._console.send("sync; reboot -f\n")
            self.wait_until_booted()
            self.monitor.execute("set-action", reboot="shutdown")

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
        self._monitor_socket.close()

    @contextlib.contextmanager
    def _losses(self, doing: str) -> Iterator[None]:
        """Tell with all the evidence what the monitor could not do."""
        try:
            yield
        except MonitorError as problem:
            self._usable = False
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._qemu.wait(QEMU_END_TIMEOUT_S)  # so that its last words are in the evidence
            lost = "the guest was lost in" if self._qemu.poll() is not None else "QEMU failed to"
            raise GuestError(f"{lost}: {doing}: {problem}\n{self.evidence()}") from problem

    def _expect(self, patterns: list[str], timeout_s: float, doing: str) -> int:
        try:
            index: int = self._console.expect(patterns, timeout=timeout_s)
        except pexpect.TIMEOUT:
            raise GuestError(f"not done after {timeout_s} s: {doing}\n{self.evidence()}") from None
        except (pexpect.EOF, OSError):
            raise GuestError(f"the guest was lost in: {doing}\n{self.evidence()}") from None
        return index


def _qemu_command(kernel: Kernel, initramfs: Path, kernel_log: Path, console_fd: int, monitor_fd: int) -> list[str]:
    """Never by /dev/kvm: where it exists it may not work, and what is tested does not depend on the machine."""
    return [
        require_tool("qemu-system-x86_64", package="qemu-system-x86"),
        *("-M", "q35", "-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max", "-smp", "1", "-m", str(MEMORY_MIB)),
        *("-nodefaults", "-display", "none", "-no-reboot"),
        *("-chardev", f"socket,id=monitor,fd={monitor_fd}", "-mon", "chardev=monitor,mode=control"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-chardev", f"file,id=kernel,path={kernel_log}", "-serial", "chardev:kernel"),
        *("-kernel", str(kernel.vmlinux), "-initrd", str(initramfs), "-append", KERNEL_OPTIONS),
        *("-netdev", "user,id=n0,restrict=off", "-device", "virtio-net-pci,romfile=,netdev=n0"),
    ]

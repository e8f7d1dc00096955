"""A guest that was booted once and saved: each scenario gets a fresh one in half a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.attach.guest import Guest
from tests.attach.kernel import Kernel


@dataclass(frozen=True, slots=True)
class SavedGuest:
    """The state of a booted machine, and what it was made of."""

    kernel: Kernel
    initramfs: Path
    state: Path

    @classmethod
    def boot(cls, kernel: Kernel, initramfs: Path, folder: Path) -> SavedGuest:
        """Boot a guest, load what scenarios need into its kernel, and save it in `folder`."""
        saved = cls(kernel, initramfs, folder / "state")
        with Guest(kernel, initramfs, folder) as guest:
            guest.run("modprobe nbd nbds_max=2 && modprobe ext4 && modprobe xfs && modprobe btrfs")
            guest.save(saved.state)
        return saved

    @contextmanager
    def restored(self, run_dir: Path) -> Iterator[Guest]:
        """Within the context the guest runs; its logs are in `run_dir`."""
        with Guest(self.kernel, self.initramfs, run_dir, arriving=True) as guest:
            guest.restore(self.state)
            yield guest

"""Debian's kernel package: found, downloaded and unpacked into the repository's cache folder, once per version."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.attach.bzimage import vmlinux_of
from tests.peers import run

META_PACKAGE = "linux-image-amd64"
CACHE_DIR = Path(__file__).resolve().parents[2] / ".cache" / "kernel"

DOWNLOAD_TIMEOUT_S = 300
UNPACK_TIMEOUT_S = 120

UNUSED_MODULE_DIRS = ("sound", "drivers/gpu", "drivers/media", "drivers/net/ethernet", "drivers/net/wireless")
"""Four fifths of the package's size, of no use to a guest without such hardware; not kept in the cache."""


class KernelUnavailableError(Exception):
    """No kernel package is known and none is in the cache."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """An unpacked kernel package."""

    release: str
    """As `uname -r` says it, for example `6.1.0-56-amd64`."""
    vmlinux: Path
    """The ELF kernel, which QEMU's `-kernel` starts."""
    root: Path
    """The folder that holds `lib/modules/RELEASE`."""

    @property
    def modules_dir(self) -> Path:
        """`lib/modules/RELEASE`, with a `modules.dep` in it."""
        return self.root / "lib" / "modules" / self.release


def debian_kernel(cache_dir: Path = CACHE_DIR) -> Kernel:
    """Return the kernel that Debian's `linux-image-amd64` depends on, fetching it when the cache has none.

    Where apt knows no such package (its lists are not downloaded) the newest kernel in the cache is taken. Raises
    `KernelUnavailableError`, or CommandError when a step of the fetching fails; a failed or interrupted call leaves
    the cache as it was.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _locked(cache_dir / "lock"):
        found = _candidate()
        if found is None:
            return _newest_cached(cache_dir)
        package, version = found
        folder = cache_dir / f"{package}_{version}"
        if not folder.exists():
            _fetch(package, folder)
        return _kernel_in(folder)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two test runs at once share the cache: the second waits for the first one's download."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _candidate() -> tuple[str, str] | None:
    depends = subprocess.run(["apt-cache", "depends", META_PACKAGE], capture_output=True, text=True, check=False)
    package = re.search(r"Depends: (linux-image-\S+)", depends.stdout)
    if package is None:
        return None
    show = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", package[1]], capture_output=True, text=True, check=False
    )
    version = re.search(r"^Version: (\S+)$", show.stdout, re.MULTILINE)
    return (package[1], version[1]) if version else None


def _newest_cached(cache_dir: Path) -> Kernel:
    folders = [path for path in cache_dir.glob("linux-image-*_*") if path.is_dir()]
    if not folders:
        raise KernelUnavailableError(f"apt knows no {META_PACKAGE} and {cache_dir} is empty: run apt-get update")
    return _kernel_in(max(folders, key=lambda path: path.stat().st_mtime))


def _kernel_in(folder: Path) -> Kernel:
    releases = sorted((folder / "lib" / "modules").iterdir())
    if len(releases) != 1:
        raise KernelUnavailableError(f"{folder}: {len(releases)} kernels under lib/modules, expected 1")
    return Kernel(release=releases[0].name, vmlinux=folder / "vmlinux", root=folder)


def _fetch(package: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="fetch-") as scratch:
        downloads, root = Path(scratch, "downloads"), Path(scratch, "root")
        downloads.mkdir()
        # apt-get downloads into its working directory and has no option for another.
        run("env", "-C", downloads, "apt-get", "download", package, timeout_s=DOWNLOAD_TIMEOUT_S)
        (archive,) = downloads.glob("*.deb")
        run("dpkg", "-x", archive, root, timeout_s=UNPACK_TIMEOUT_S)
        _prepare(root, package.removeprefix("linux-image-"))
        root.rename(folder)


def _prepare(root: Path, release: str) -> None:
    """Unpack the boot image, drop what no guest needs, and write the `modules.dep` that a .deb does not have."""
    if not (root / "lib" / "modules").exists() and (root / "usr" / "lib" / "modules").exists():
        (root / "lib").symlink_to("usr/lib")
    bzimage = root / "boot" / f"vmlinuz-{release}"
    (root / "vmlinux").write_bytes(vmlinux_of(bzimage.read_bytes()))
    for unused in UNUSED_MODULE_DIRS:
        shutil.rmtree(root / "lib" / "modules" / release / "kernel" / unused, ignore_errors=True)
    for unused in ("boot", "usr/share"):
        shutil.rmtree(root / unused, ignore_errors=True)
    run("busybox", "depmod", "-b", root, release, timeout_s=UNPACK_TIMEOUT_S)

"""The guest's initramfs, made on the spot from this machine's programs and the kernel package's modules."""

from __future__ import annotations

import lzma
import re
import shutil
import tempfile
from pathlib import Path

from tests.attach.kernel import Kernel
from tests.peers import require_tool, run

INIT_SCRIPT = Path(__file__).with_name("init.sh")

SHELL = "dash"
"""Not busybox's shell, which prefers its own applets to the programs in PATH, and fstrim is both."""

PROGRAMS = {
    SHELL: "dash",
    "nbd-client": "nbd-client",
    "mkfs.ext4": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "dumpe2fs": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "fstrim": "util-linux",
    "blkid": "util-linux",
    "sfdisk": "fdisk",
    "mkfs.xfs": "xfsprogs",
    "xfs_repair": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "btrfs": "btrfs-progs",
}
"""Copied to the guest's /usr/sbin with the libraries they load, and each one's package; all else there is busybox."""

MODULES_AT_BOOT = ("virtio_pci", "virtio_net", "virtio_blk", "virtio_scsi", "sd_mod", "crc32c_generic")
"""ext4 asks for crc32c by a soft dependency that modules.dep does not have."""

MODULES = ("nbd", "ext4", "xfs", "btrfs", "9p", "9pnet_virtio", "vsock_loopback")
"""In the guest for `modprobe`; the kernel loads a filesystem by itself when it is mounted."""

COPIED_FILES = ("/etc/mke2fs.conf",)

PYTHON = Path("/usr/bin/python3")
"""Debian's, whose paths are the same in the guest."""

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "nbd_set_size.py"
"""A script of the documentation, for users; it is in the guest's PATH."""

SCRIPT_NEEDS = "import encodings.ascii, encodings.latin_1, os, runpy, site, socket, struct, sys"

LIST_MODULES = (
    f"{SCRIPT_NEEDS}; print(*(m.__file__ for m in sys.modules.values() if hasattr(m, '__file__')), sep='\\n')"
)

LIBRARY = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)
"""A line of ldd's answer: `libz.so.1 => /lib/libz.so.1 (0x…)`, or the dynamic loader alone."""


def build_initramfs(kernel: Kernel, destination: Path) -> Path:
    """Write the cpio archive `destination` for `kernel` and return it.

    Skips the test where a program is not installed; raises FileNotFoundError for a module that the kernel does not
    have, and CommandError when a build step fails.
    """
    with tempfile.TemporaryDirectory(prefix="initramfs-") as scratch:
        root = Path(scratch)
        _make_skeleton(root)
        for name, package in PROGRAMS.items():
            _copy_program(Path(require_tool(name, package=package)), root)
        _copy_python(root)
        _copy_modules(kernel, root)
        _pack(root, destination)
    return destination


def _make_skeleton(root: Path) -> None:
    for folder in ("bin", "dev", "etc", "mnt", "proc", "sys", "tmp", "usr/sbin"):
        (root / folder).mkdir(parents=True)
    (root / "sbin").symlink_to("bin")
    busybox = require_tool("busybox", package="busybox-static")
    shutil.copy(busybox, root / "bin" / "busybox")
    applets = run(busybox, "--list").split()
    for applet in applets:
        if applet not in ("busybox", "sh"):
            (root / "bin" / applet).symlink_to("busybox")
    (root / "bin" / "sh").symlink_to(f"/usr/sbin/{SHELL}")
    shutil.copy(INIT_SCRIPT, root / "init")
    (root / "init").chmod(0o755)
    (root / "etc" / "mtab").symlink_to("/proc/mounts")
    (root / "etc" / "modules").write_text("\n".join(MODULES_AT_BOOT) + "\n")
    for name in filter(lambda name: Path(name).exists(), COPIED_FILES):
        shutil.copy(name, root / name.lstrip("/"))


def _copy_program(path: Path, root: Path) -> None:
    shutil.copy(path, root / "usr" / "sbin" / path.name)
    _copy_libraries(path, root)


def _copy_python(root: Path) -> None:
    """Python with as much of its library as the script takes, compiled, for the guest's processor is a slow one."""
    python = require_tool(str(PYTHON), package="python3")
    _copy_program(Path(python), root)
    for name in run(python, "-I", "-S", "-c", LIST_MODULES).split():
        source = Path(name)
        target = root / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
        if source.suffix != ".py":
            _copy_libraries(source, root)
    for library in (root / "usr" / "lib").glob("python3*"):
        (library / "lib-dynload").mkdir(exist_ok=True)  # Python complains of a missing one
    run(python, "-m", "compileall", "-q", "-b", root / "usr" / "lib")
    for source in (root / "usr" / "lib").rglob("*.py"):
        source.unlink()
    shutil.copy(SCRIPT, root / "usr" / "sbin" / SCRIPT.name)


def _copy_libraries(path: Path, root: Path) -> None:
    for library in LIBRARY.findall(run("ldd", path)):
        target = root / library.lstrip("/")
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, target)


def _copy_modules(kernel: Kernel, root: Path) -> None:
    target_dir = root / "lib" / "modules" / kernel.release
    for relative in sorted(_with_dependencies(kernel, (*MODULES_AT_BOOT, *MODULES))):
        source, target = kernel.modules_dir / relative, target_dir / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".xz":
            target.with_suffix("").write_bytes(lzma.decompress(source.read_bytes()))
        else:
            shutil.copy(source, target)
    run("busybox", "depmod", "-b", root, kernel.release)


def _with_dependencies(kernel: Kernel, names: tuple[str, ...]) -> set[str]:
    """Return the files, relative to the modules folder, that loading `names` takes; what is built in takes none."""
    needed: dict[str, list[str]] = {}
    for line in (kernel.modules_dir / "modules.dep").read_text().splitlines():
        path, _, dependencies = line.partition(":")
        needed[path] = dependencies.split()
    by_name = {_module_name(path): path for path in needed}
    built_in = {_module_name(line) for line in (kernel.modules_dir / "modules.builtin").read_text().splitlines()}
    files: set[str] = set()
    pending = []
    for name in names:
        if name in by_name:
            pending.append(by_name[name])
        elif name not in built_in:
            raise FileNotFoundError(f"{kernel.modules_dir}: no module {name}")
    while pending:
        path = pending.pop()
        if path not in files:
            files.add(path)
            pending += needed[path]
    return files


def _module_name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")


def _pack(root: Path, destination: Path) -> None:
    names = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*")))
    cpio = require_tool("cpio", package="cpio")
    run(
        *(cpio, "--create", "--format=newc", "--owner=0:0", "--quiet", f"--directory={root}", f"--file={destination}"),
        stdin=names.encode(),
    )

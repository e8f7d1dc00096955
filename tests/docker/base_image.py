"""A stand-in for the image that docker/Dockerfile is built on, made of this machine's own files.

Nothing is pulled from a registry, and nothing downloaded: a shell and the few programs that the Dockerfile runs, this
Python's library under /usr/local as Docker's image of Python has it, pip beside it, and the shared libraries of all.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tests.peers import SYSTEM_PATH, run

PROGRAMS = (
    *("sh", "cat", "chmod", "chown", "env", "find", "groupadd", "id", "ls", "mkdir", "rm", "sleep", "touch", "true"),
    *("useradd",),
)
"""What the Dockerfile, the compose file and the tests run in it, beside Python."""

LEFT_OUT = ("site-packages", "dist-packages", "test", "idlelib", "tkinter", "turtledemo", "lib2to3", "__pycache__")
"""Parts of Python's library that are large, or belong to this machine's user."""

LEFT_OUT_MODULES = re.compile(r"_tkinter\..*|_test.*|_ctypes_test\..*|EXTERNALLY-MANAGED|config-\d.*|.*\.a")

OF_EVERY_DEBIAN = (
    *("libnss_*.so.2", "libresolv.so.2", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libutil.so.1", "libm.so.6"),
    *("libgcc_s.so.1", "libstdc++.so.6"),
)
"""Shared libraries that packages from wheels count on, and that glibc opens by itself."""

PIP = """#!/usr/local/bin/python3
import sys
from pip._internal.cli.main import main
sys.exit(main())
"""

ETC = {
    "passwd": "root:x:0:0:root:/root:/bin/sh\n",
    "group": "root:x:0:\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "ld.so.conf": f"/usr/local/lib\n/usr/lib/{sysconfig.get_config_var('MULTIARCH')}\n",
    "login.defs": "UID_MIN 1000\nUID_MAX 60000\nGID_MIN 1000\nGID_MAX 60000\n",
}


def make_base_root(root: Path, pip_wheel: Path) -> None:
    """Fill a folder with the root file system.

    Args:
        root: the folder, which is empty.
        pip_wheel: pip, as it is published.
    """
    for folder in ("bin", "sbin", "lib", "lib64"):
        (root / "usr" / folder).mkdir(parents=True)
        (root / folder).symlink_to(f"usr/{folder}")
    for folder in ("dev", "etc", "home", "proc", "root", "run", "sys", "tmp", "var/tmp", "usr/local/bin"):
        (root / folder).mkdir(parents=True)
    for folder in ("tmp", "var/tmp"):
        (root / folder).chmod(0o1777)
    for name, text in ETC.items():
        (root / "etc" / name).write_text(text)
    programs = [Path(shutil.which(name, path=SYSTEM_PATH) or name) for name in PROGRAMS]
    for program in programs:
        shutil.copy2(program.resolve(), root / "usr/bin" / program.name)
    python = _copy_python(root / "usr/local")
    _copy_libraries(root, [*programs, *python])
    _unpack_pip(pip_wheel, root / "usr/local")
    run("ldconfig", "-r", root)


def _copy_python(local: Path) -> list[Path]:
    """This Python under /usr/local; the files of it that want shared libraries."""
    release = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = local / "lib" / release
    program = Path(sys.executable).resolve()
    shutil.copy2(program, local / "bin" / release)
    (local / "bin/python3").symlink_to(release)
    (local / "bin/python").symlink_to("python3")

    def left_out(_folder: str, names: list[str]) -> list[str]:
        return [name for name in names if name in LEFT_OUT or LEFT_OUT_MODULES.fullmatch(name)]

    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=left_out)
    (library / "site-packages").mkdir(exist_ok=True)
    return [program, *library.glob("lib-dynload/*.so")]


def _copy_libraries(root: Path, programs: Iterable[Path]) -> None:
    """Every shared library of the programs, by the name that they ask for."""
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    wanted = {Path(path) for path in re.findall(r"(?:=> |^\s*)(/\S+) \(0x", listed, re.M)}
    beside = next(path.parent for path in wanted if path.name.startswith("libc.so"))
    wanted.update(path for name in OF_EVERY_DEBIAN for path in beside.glob(name))
    for path in wanted:
        # What lies in a folder of Python's own is found in /usr/local/lib.
        known = path.is_relative_to("/lib") or path.is_relative_to("/lib64") or path.is_relative_to("/usr/lib")
        place = root / (path.parent.relative_to("/") if known else "usr/local/lib") / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path.resolve(), place)


def _unpack_pip(wheel: Path, local: Path) -> None:
    packages = next(local.glob("lib/python3.*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    script = local / "bin/pip"
    script.write_text(PIP)
    script.chmod(0o755)
    (local / "bin/pip3").symlink_to("pip")


def pack(root: Path, archive: Path) -> None:
    """Put the folder into a tar archive, of which an image can be made."""
    run("tar", "-C", root, "--owner=0", "--group=0", "--numeric-owner", "-cf", archive, ".")

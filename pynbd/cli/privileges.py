"""What a server gives up once its disks are open: the user who started it, and whatever else it does not need."""

import argparse
import asyncio
import encodings.idna  # noqa: F401  # names of hosts need it, and where it is may be out of reach later
import grp
import logging
import os
import pwd
import site
import sys
import sysconfig
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import nbd_protocol
import pynbd
from pynbd.block import pool
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.node import Node
from pynbd.server import events
from pynbd.server.events import about
from pynbd.server.landlock import READ, WRITE, FsAccess, Grants, restrict
from pynbd.server.service import Service
from pynbd.storage.file import File

log = logging.getLogger(__name__)

LOCAL_DRIVERS = frozenset({"file", "host_device", "memory", "null"})
"""Drivers that hold bytes and reach nobody. Whatever else does that may need the network."""

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
"""Where libraries are that are loaded when they are used."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

NAME_SERVICE = (
    "/etc/hosts",
    "/etc/host.conf",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/run/systemd/resolve",
)
"""What is read to find out where a host is."""

USERS = ("/etc/passwd", "/etc/group", "/etc/nsswitch.conf")
"""What is read to find out whom a name in a rule stands for."""

MAX_ID = 2**32 - 2


class Identity(NamedTuple):
    """A user and groups.

    Args:
        uid: None: it stays who it is.
        gid: the group, None: it stays the same.
        groups: further ones.
    """

    uid: int | None
    gid: int | None
    groups: tuple[int, ...]


def identity(user: str, group: str) -> Identity:
    """What names (or numbers) of a user and a group stand for; without a group it is the user's own, and further ones.

    Raises:
        OptionError: there is none of that name.
    """
    uid = gid = None
    groups: tuple[int, ...] = ()
    if user:
        try:
            entry = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
        except (KeyError, OverflowError):
            if not user.isdecimal() or int(user) > MAX_ID:
                raise OptionError(f"--user: there is no user {user!r}") from None
            uid = int(user)
        else:
            uid, gid = entry.pw_uid, entry.pw_gid
            groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid))
    if group:
        try:
            gid = grp.getgrgid(int(group)).gr_gid if group.isdecimal() else grp.getgrnam(group).gr_gid
        except (KeyError, OverflowError):
            if not group.isdecimal() or int(group) > MAX_ID:
                raise OptionError(f"--group: there is no group {group!r}") from None
            gid = int(group)
        groups = (gid,)
    if uid is not None and gid is None:
        raise OptionError(f"--user: nothing is known of the user {user}: give a --group as well")
    return Identity(uid, gid, groups)


def become(who: Identity) -> None:
    """Be somebody else from now on, for good.

    Raises:
        BlockError: it is not allowed.
    """
    try:
        if who.gid is not None:
            os.setgroups(who.groups)
            os.setgid(who.gid)
        if who.uid is not None:
            os.setuid(who.uid)
    except PermissionError:
        raise BlockError(f"--user, --group: only root can become somebody else, not the user {os.geteuid()}") from None
    if who.uid and os.getresuid() != (who.uid,) * 3:
        raise BlockError(f"--user: the way back from {who.uid} to {os.getresuid()} is open")


class Privileges:
    """What is given up once everything is open. To be made before anything starts a thread.

    Args:
        arguments: `user`, `group`; `confine`, and what is granted then by `may_read` and `may_write`.

    Raises:
        OptionError: there is no such user or group.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self._identity = identity(arguments.user, arguments.group)
        self._own_code = own_code()  # now: somebody else may not be able to find it out
        self._threads = ThreadPoolExecutor(thread_name_prefix="pynbd-default")
        asyncio.get_running_loop().set_default_executor(self._threads)

    def give_up(self, service: Service) -> None:
        """Become who is to serve, and open nothing any more that is not needed for that.

        Raises:
            BlockError: it is not allowed, the kernel can't do it, or there are threads for which it would not hold.
            OSError: a rule can't be made.
        """
        become(self._identity)
        if not self._arguments.confine:
            return
        grants = self.grants(service)
        pool.renew_threads()
        self._threads.shutdown(wait=True)
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(thread_name_prefix="pynbd-default"))
        try:
            version = restrict(grants)
        except BlockError as problem:
            raise BlockError(f"--confine: {problem}") from None
        log.info("confined by Landlock, version %d", version, extra=about(events.CONFINED, version=version))

    def grants(self, service: Service) -> Grants:
        """What stays possible."""
        arguments = self._arguments
        nodes = service.graph.nodes.values()
        connect = any(not node.children and node.driver.name not in LOCAL_DRIVERS for node in nodes)
        files: dict[Path, FsAccess] = {}

        def grant(paths: Iterable[Path], access: FsAccess) -> None:
            for path in paths:
                files[path] = files.get(path, FsAccess(0)) | access

        grant(self._own_code, READ)
        grant(map(Path, DEVICES), READ | FsAccess.WRITE_FILE)
        if connect:
            grant(map(Path, NAME_SERVICE), READ)
        for path, access in images(nodes):
            grant([path], access)
        if service.server.tls is not None:
            grant(folders_of(service.server.tls.credentials.files()), READ)
        if arguments.config:
            grant([Path(arguments.config), *map(Path, USERS)], READ)
        if arguments.log_file:
            grant([Path(arguments.log_file)], READ | WRITE)
        grant(map(Path, arguments.may_read), READ)
        grant(map(Path, arguments.may_write), WRITE)
        # Sockets and the pid file are removed at the end; who removes a file changes its folder.
        removed = [*service.server.socket_paths, *([Path(arguments.pid_file)] if arguments.pid_file else [])]
        grant({path.absolute().parent for path in removed}, FsAccess.REMOVE_FILE)
        return Grants(files, connect)


def own_code() -> set[Path]:
    """Where this program's modules and libraries are: some are loaded when they are first used."""
    known = sysconfig.get_paths()
    paths = {Path(known[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths |= {Path(name) for name in (*site.getsitepackages(), *LIBRARIES, f"{sys.base_prefix}/lib")}
    paths |= {Path(folder) for package in (pynbd, nbd_protocol) for folder in package.__path__}
    return paths


def images(nodes: Iterable[Node]) -> Iterable[tuple[Path, FsAccess]]:
    """The files of nodes, which may be opened anew; for writing, if they are open for it."""
    for node in nodes:
        if isinstance(node.driver, File):
            yield Path(node.driver.filename()), READ if node.read_only else READ | WRITE


def folders_of(files: Iterable[Path]) -> set[Path]:
    """The folders of files that are replaced when they change, also of those that links lead to."""
    folders = set()
    for path in files:
        for one in (path.absolute(), path.resolve()):
            folders.add(one if one.is_dir() else one.parent)
    return folders

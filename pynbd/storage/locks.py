"""Locks on image files, byte for byte those of QEMU, so that a running QEMU and pynbd exclude each other.

For each permission that is held on an image there is a shared lock on the byte 100 + its number, and for each one
that is *not* shared with others on the byte 200 + its number. Nobody ever takes an exclusive lock: whoever wants a
permission looks whether someone else has a lock on "not shared", and the other way round. The locks belong to the open
file description (OFD), so that closing another descriptor of the same file in this process does not drop them.

Source: the lock bytes and their meaning are those of QEMU's block/file-posix.c (2.10 and later).
"""

import errno
import logging

from pynbd.block.errors import PermissionConflict
from pynbd.block.permissions import Permission
from pynbd.storage import linux

log = logging.getLogger(__name__)

HELD_BASE = 100
UNSHARED_BASE = 200

NAMES = {
    Permission.CONSISTENT_READ: "consistent read",
    Permission.WRITE: "write",
    Permission.WRITE_UNCHANGED: "write unchanged",
    Permission.RESIZE: "resize",
}
"""What QEMU calls the permissions in messages."""

NO_LOCKS_HERE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK})
"""What file systems without OFD locks answer."""


def lock_bytes(held: Permission, shared: Permission) -> set[int]:
    """The bytes that somebody with these permissions has locked."""
    return {HELD_BASE + number(p) for p in NAMES if p in held} | {
        UNSHARED_BASE + number(p) for p in NAMES if p not in shared
    }


def number(permission: Permission) -> int:
    """Which bit a single permission is."""
    return permission.bit_length() - 1


class FileLocks:
    """The locks on one open file.

    Args:
        fd: the file, open for reading at least.
        filename: its name, for messages.
        required: whether a file system without locks is an error; otherwise it is used without.
        shared: whether others that have locks belong to us: another process of ours has looked for strangers. Ours keep
            them off for as long as any of these processes has the file open.
    """

    def __init__(self, fd: int, filename: str, *, required: bool, shared: bool = False) -> None:
        self._fd = fd
        self._filename = filename
        self._required = required
        self._shared = shared
        self._locked: set[int] = set()
        self._disabled = False

    def prepare(self, held: Permission, shared: Permission) -> None:
        """Take what these permissions need in addition to what is locked already.

        Raises:
            PermissionConflict: another process stands against it. What was locked more stays so until `settle`.
        """
        if self._disabled:
            return
        try:
            # First lock, then look: of two who do this at the same time, at least one sees the other.
            for byte in sorted(lock_bytes(held, shared) - self._locked):
                linux.lock_shared(self._fd, byte)
                self._locked.add(byte)
            if self._shared:
                return
            for permission, name in NAMES.items():
                if permission in held and linux.locked_by_others(self._fd, UNSHARED_BASE + number(permission)):
                    raise self._conflict(f'Failed to get "{name}" lock')
                if permission not in shared and linux.locked_by_others(self._fd, HELD_BASE + number(permission)):
                    raise self._conflict(f'Failed to get shared "{name}" lock')
        except OSError as problem:
            if problem.errno in (errno.EAGAIN, errno.EACCES):
                raise self._conflict("Failed to lock a byte of the image exclusively locked by someone") from None
            if problem.errno not in NO_LOCKS_HERE or self._required:
                raise PermissionConflict(f"{self._filename}: Failed to lock the image: {problem.strerror}") from None
            log.warning("%s: this file system has no locks (%s); opened without", self._filename, problem.strerror)
            self._disabled = True

    def _conflict(self, what: str) -> PermissionConflict:
        return PermissionConflict(
            f"{self._filename}: {what}. Is another process using the image? If both are meant to use it, open it "
            f"read-only with force-share=on, or with locking=off"
        )

    def settle(self, held: Permission, shared: Permission) -> None:
        """Give back every lock that these permissions do not need. Never fails."""
        for byte in self._locked - lock_bytes(held, shared):  # a new set, so that it may shrink
            try:
                linux.unlock(self._fd, byte)
            except OSError as problem:
                # It ends with the file at the latest; meanwhile others are kept off for longer than needed.
                log.warning("%s: lock byte %d can't be given back: %s", self._filename, byte, problem.strerror)
            else:
                self._locked.discard(byte)

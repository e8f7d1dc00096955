"""What goes wrong: either we broke the protocol, or the peer did; and how errors cross the wire.

::

    NbdProtocolError
    ├── LocalProtocolError    the caller asked for what the protocol cannot say; nothing was sent
    └── RemoteProtocolError   the peer broke the protocol; the connection cannot be used any more
    OptionRefused             the server said no to an option, which is its right
"""

import errno
from typing import Final

from nbd_protocol.constants import Errno, OptionReplyType

__all__ = [
    "LocalProtocolError",
    "NbdProtocolError",
    "OptionRefused",
    "RemoteProtocolError",
    "errno_to_nbd",
    "nbd_to_errno",
]


class NbdProtocolError(Exception):
    """One of the two ends broke the NBD protocol."""


class LocalProtocolError(NbdProtocolError):
    """This end was asked to break the protocol; nothing was sent and no state has changed."""


class RemoteProtocolError(NbdProtocolError):
    """The peer broke the protocol; close the connection, nothing further on it can be trusted."""


class OptionRefused(Exception):
    """The server refused an option.

    Attributes:
        reply_type: the error reply, an OptionReplyType where it is a known one.
        text: what the server said, may be empty.
    """

    def __init__(self, reply_type: int, text: str = "") -> None:
        super().__init__(reply_type, text)
        self.reply_type = reply_type
        self.text = text

    def __str__(self) -> str:
        try:
            name = OptionReplyType(self.reply_type).name
        except ValueError:
            name = f"unknown error reply {self.reply_type:#x}"
        return f"{name}: {self.text}" if self.text else name


_TO_NBD: Final[dict[int, Errno]] = {
    0: Errno.OK,
    errno.EPERM: Errno.EPERM,
    errno.EACCES: Errno.EPERM,
    errno.EROFS: Errno.EPERM,
    errno.EIO: Errno.EIO,
    errno.ENOMEM: Errno.ENOMEM,
    errno.EINVAL: Errno.EINVAL,
    errno.ENOSPC: Errno.ENOSPC,
    errno.EDQUOT: Errno.ENOSPC,
    errno.EFBIG: Errno.ENOSPC,
    errno.ENOTSUP: Errno.EINVAL,
    errno.ESHUTDOWN: Errno.ESHUTDOWN,
}

_FROM_NBD: Final[dict[int, int]] = {
    Errno.OK: 0,
    Errno.EPERM: errno.EPERM,
    Errno.EIO: errno.EIO,
    Errno.ENOMEM: errno.ENOMEM,
    Errno.EINVAL: errno.EINVAL,
    Errno.ENOSPC: errno.ENOSPC,
    Errno.EOVERFLOW: errno.EOVERFLOW,
    Errno.ENOTSUP: errno.ENOTSUP,
    Errno.ESHUTDOWN: errno.ESHUTDOWN,
}


def errno_to_nbd(os_errno: int | None, *, fast_zero: bool = False) -> Errno:
    """Give the NBD error nearest to an errno of the operating system (section "Error values").

    Args:
        os_errno: the errno; None (an OSError without one) is EIO.
        fast_zero: the request was WRITE_ZEROES with FAST_ZERO, the only one that may be answered ENOTSUP.

    A backend's EOVERFLOW becomes EIO: on the wire it means only that a read with DF was too long.
    """
    if fast_zero and os_errno == errno.ENOTSUP:
        return Errno.ENOTSUP
    return Errno.EIO if os_errno is None else _TO_NBD.get(os_errno, Errno.EIO)


def nbd_to_errno(error: int) -> int:
    """Give the operating system's errno for an NBD error; an unknown one counts as EINVAL, as the spec asks."""
    return _FROM_NBD.get(error, errno.EINVAL)

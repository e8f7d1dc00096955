"""Errors across the wire, in both directions."""

import errno

import pytest

from nbd_protocol.constants import Errno, OptionReplyType
from nbd_protocol.errors import (
    LocalProtocolError,
    NbdProtocolError,
    OptionRefused,
    RemoteProtocolError,
    errno_to_nbd,
    nbd_to_errno,
)


@pytest.mark.parametrize(
    ("os_errno", "expected"),
    [
        (0, Errno.OK),
        (errno.EPERM, Errno.EPERM),
        (errno.EACCES, Errno.EPERM),
        (errno.EROFS, Errno.EPERM),
        (errno.EIO, Errno.EIO),
        (errno.ENOMEM, Errno.ENOMEM),
        (errno.EINVAL, Errno.EINVAL),
        (errno.ENOSPC, Errno.ENOSPC),
        (errno.EDQUOT, Errno.ENOSPC),
        (errno.EFBIG, Errno.ENOSPC),
        (errno.ENOTSUP, Errno.EINVAL),
        (errno.ESHUTDOWN, Errno.ESHUTDOWN),
        (errno.EOVERFLOW, Errno.EIO),
        (errno.ENOENT, Errno.EIO),
        (errno.ETIMEDOUT, Errno.EIO),
        (None, Errno.EIO),
    ],
)
def test_errno_to_nbd(os_errno: int | None, expected: Errno) -> None:
    assert errno_to_nbd(os_errno) is expected


def test_conformance_18_enotsup_is_told_only_of_a_fast_zero() -> None:
    assert errno_to_nbd(errno.ENOTSUP, fast_zero=True) is Errno.ENOTSUP
    assert errno_to_nbd(errno.EOPNOTSUPP, fast_zero=True) is Errno.ENOTSUP
    assert errno_to_nbd(errno.ENOTSUP) is Errno.EINVAL
    assert errno_to_nbd(errno.EROFS, fast_zero=True) is Errno.EPERM


def test_no_errno_is_sent_raw() -> None:
    for number in range(200):
        assert isinstance(errno_to_nbd(number), Errno)


@pytest.mark.parametrize("error", Errno)
def test_nbd_errors_keep_their_name(error: Errno) -> None:
    assert nbd_to_errno(error) == (0 if error is Errno.OK else getattr(errno, error.name))


@pytest.mark.parametrize("unknown", [2, 11, 4096, 2**32 - 1])
def test_an_unknown_nbd_error_counts_as_einval(unknown: int) -> None:
    assert nbd_to_errno(unknown) == errno.EINVAL


def test_the_two_faults_are_told_apart() -> None:
    assert issubclass(LocalProtocolError, NbdProtocolError)
    assert issubclass(RemoteProtocolError, NbdProtocolError)
    assert not issubclass(OptionRefused, NbdProtocolError)


def test_a_refusal_says_what_the_server_said() -> None:
    refused = OptionRefused(OptionReplyType.ERR_UNKNOWN, "no export 'x'")
    assert str(refused) == "ERR_UNKNOWN: no export 'x'"
    assert str(OptionRefused(0x80001234)) == "unknown error reply 0x80001234"

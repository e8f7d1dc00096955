"""Hashes by the names that LUKS and QEMU give them, and keys made of passphrases with them."""

import functools
import hashlib
import time
from collections.abc import Callable

from pynbd.block.errors import OptionError

HASHES = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512", "ripemd160")
"""Those that QEMU takes. Whether `ripemd160` is there (and `md5`, in a FIPS mode) is up to the OpenSSL below Python."""

MEASURED_S = 0.1
"""How long iterations are counted; in so long a clock of a few milliseconds' resolution errs by a few percent."""

FIRST_TRY_ITERATIONS = 1 << 12


def check_hash(name: str, what: str) -> None:
    """Check that a hash is known and there.

    Args:
        name: of the hash.
        what: where it was asked for, for the message: `hash-alg`.

    Raises:
        OptionError: it is not.
    """
    if name not in HASHES:
        raise OptionError(f"{what}: there is no hash {name!r} here; there are: {', '.join(HASHES)}")
    try:
        hashlib.new(name, usedforsecurity=False)
    except ValueError as problem:
        raise OptionError(f"{what}: the OpenSSL of this Python lacks the hash {name!r} ({problem})") from None


def digest(name: str, content: bytes) -> bytes:
    """The hash of some bytes."""
    return hashlib.new(name, content, usedforsecurity=False).digest()


def hasher(name: str) -> tuple[Callable[[bytes], bytes], int]:
    """(a function that hashes some bytes, how many it gives), for who hashes thousands of times."""
    # Those that hashlib has under their own names are made twice as fast as by `new`.
    new = getattr(hashlib, name, None) or functools.partial(hashlib.new, name)
    size = len(digest(name, b""))
    return lambda content: new(content, usedforsecurity=False).digest(), size


def derive_key(hash_name: str, passphrase: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """PBKDF2 (RFC 8018): `length` bytes from a passphrase. It takes long, and lets other threads run."""
    return hashlib.pbkdf2_hmac(hash_name, passphrase, salt, iterations, length)


def iterations_in(hash_name: str, length: int, duration_s: float) -> int:
    """How many iterations of PBKDF2 this machine does in a time, measured by the thread's own processor time.

    Args:
        hash_name: the hash.
        length: of the key in bytes; each length of the hash counts anew.
        duration_s: the time.
    """
    iterations = FIRST_TRY_ITERATIONS
    while True:
        started = time.thread_time()
        derive_key(hash_name, b"passphrase", bytes(32), iterations, length)
        spent_s = time.thread_time() - started
        if spent_s >= MEASURED_S:
            return int(iterations * duration_s / spent_s)
        iterations *= 2 if spent_s > MEASURED_S / 16 else 16

"""AES-XTS by the OpenSSL that is in the process anyhow, below Python's own `hashlib` and `ssl`.

Each sector has a tweak of its own. `cryptography` makes a new cipher for each, which takes 11 µs; OpenSSL sets another
tweak in a few hundred nanoseconds, so that a sector takes 2 µs in all, most of which is what `ctypes` takes for two
calls. The interpreter lock is kept: giving it up 4096 times per MiB would cost more than all the rest, and with
threads that want it, milliseconds each time.
"""

import ctypes
import functools
import weakref
from typing import Any

SONAMES = ("libcrypto.so.4", "libcrypto.so.3", "libcrypto.so.1.1")
"""Versions whose functions are those used here; the loader finds the one that is in the process already."""

SECTOR_BYTES = 512

POINTER, INT = ctypes.c_void_p, ctypes.c_int


@functools.cache
def load() -> Any:
    """The library, or None if this system has none."""
    for name in SONAMES:
        try:
            library = ctypes.PyDLL(name)
        except OSError:
            continue
        for function, result, arguments in (
            ("EVP_aes_128_xts", POINTER, []),
            ("EVP_aes_256_xts", POINTER, []),
            ("EVP_CIPHER_CTX_new", POINTER, []),
            ("EVP_CIPHER_CTX_free", None, [POINTER]),
            ("EVP_EncryptInit_ex", INT, [POINTER] * 5),
            ("EVP_DecryptInit_ex", INT, [POINTER] * 5),
            ("EVP_EncryptUpdate", INT, [POINTER] * 4 + [INT]),
            ("EVP_DecryptUpdate", INT, [POINTER] * 4 + [INT]),
        ):
            found = getattr(library, function)
            found.restype, found.argtypes = result, arguments
        return library
    return None


def takes(key: bytes) -> bool:
    """Whether there is a library, and it takes a key for XTS: not of AES-192, and not with halves that are the same."""
    half = len(key) // 2
    return half in (16, 32) and key[:half] != key[half:] and load() is not None


class XtsContext:
    """AES-XTS with one key, in one direction. Not for two threads at a time.

    Args:
        key: 32 bytes (AES-128) or 64 (AES-256) that it `takes`.
        encrypting: the direction.
    """

    def __init__(self, key: bytes, *, encrypting: bool) -> None:
        library = load()
        self._set = library.EVP_EncryptInit_ex if encrypting else library.EVP_DecryptInit_ex
        self._update = library.EVP_EncryptUpdate if encrypting else library.EVP_DecryptUpdate
        self._context = library.EVP_CIPHER_CTX_new()
        if not self._context:
            raise MemoryError
        weakref.finalize(self, library.EVP_CIPHER_CTX_free, self._context)
        self._length = INT()
        cipher = library.EVP_aes_128_xts() if len(key) == 32 else library.EVP_aes_256_xts()
        if not self._set(self._context, cipher, None, key, bytes(16)):
            raise OSError("OpenSSL refuses this key for AES-XTS")

    def sectors(self, data: memoryview | bytearray, tweaks: bytearray) -> None:
        """Encrypt or decrypt sectors in place.

        Args:
            data: writable, of whole sectors.
            tweaks: 16 bytes for each of them.
        """
        set_tweak, update, context = self._set, self._update, self._context
        data_pin = (ctypes.c_char * len(data)).from_buffer(data)
        tweak_pin = (ctypes.c_char * len(tweaks)).from_buffer(tweaks)
        first, tweak = ctypes.addressof(data_pin), ctypes.addressof(tweak_pin)
        length = ctypes.addressof(self._length)
        for at in range(first, first + len(data), SECTOR_BYTES):
            if not (set_tweak(context, None, None, None, tweak) and update(context, at, length, at, SECTOR_BYTES)):
                raise OSError("OpenSSL fails at AES-XTS")
            tweak += 16

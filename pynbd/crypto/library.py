"""The package `cryptography`, imported when something is encrypted or decrypted for the first time.

It comes with the extra `crypto`; whoever has no encrypted disks does without it.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from pynbd.block.errors import OptionError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext

NEEDED = "encryption needs the Python package cryptography, version 43 or later: pip install 'pynbd[crypto]'"

AES_BLOCK_BYTES = 16

AesMode = Literal["ecb", "cbc", "ctr"]

Context = TypeVar("Context")


class Pool(Generic[Context]):
    """Contexts of a cipher, which take longer to make than a sector to encrypt, and serve one thread at a time.

    Args:
        make: makes one more.
    """

    def __init__(self, make: Callable[[], Context]) -> None:
        self._make = make
        self._free: list[Context] = []

    def take(self) -> Context:
        """A context that nobody else uses until it is given back. One that failed is to be dropped."""
        try:
            return self._free.pop()
        except IndexError:
            return self._make()

    def give(self, context: Context) -> None:
        """Give a context back."""
        self._free.append(context)


def _aes(key: bytes, mode: AesMode, iv: bytes) -> "Cipher":  # type: ignore[type-arg]  # any of its modes
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError as problem:
        raise OptionError(f"{NEEDED} ({problem})") from problem
    if mode == "ecb":
        return Cipher(algorithms.AES(key), modes.ECB())  # noqa: S305  # disks are encrypted so, and so is a tweak
    return Cipher(algorithms.AES(key), modes.CBC(iv) if mode == "cbc" else modes.CTR(iv))


def aes_encryptor(key: bytes, mode: AesMode, iv: bytes = bytes(AES_BLOCK_BYTES)) -> "CipherContext":
    """AES in a mode, to encrypt with.

    Args:
        key: of 16, 24 or 32 bytes.
        mode: how blocks are chained.
        iv: of 16 bytes; `ecb` has none.

    Raises:
        OptionError: the package `cryptography` is missing.
    """
    return _aes(key, mode, iv).encryptor()


def aes_decryptor(key: bytes, mode: AesMode, iv: bytes = bytes(AES_BLOCK_BYTES)) -> "CipherContext":
    """AES in a mode, to decrypt with; see `aes_encryptor`."""
    return _aes(key, mode, iv).decryptor()

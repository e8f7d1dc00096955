"""`Secret`: a passphrase or a key under an id, as QEMU's object `secret`.

    secret,id=sec0,file=passphrase.txt                                  the bytes of a file, a newline at its end too
    secret,id=sec0,data=letmein                                         seen by everybody who can list processes
    secret,id=key0,file=master.b64,format=base64                        binary
    secret,id=sec1,keyid=key0,data=…,iv=…,format=base64                 encrypted by another secret

Neither the text nor the `repr` of anything here shows what is secret.
"""

import base64
import binascii
from pathlib import Path
from typing import ClassVar, Literal

from pynbd.block.errors import OptionError
from pynbd.block.objects import ObjectOptions, Objects, UserObject
from pynbd.crypto.library import AES_BLOCK_BYTES, aes_decryptor

MAX_SECRET_BYTES = 1 << 20
"""The largest secret; passphrases and keys are far smaller, and a wrong file is often far larger."""

KEY_BYTES = 32
"""A secret that encrypts others is a key of AES-256."""


class SecretOptions(ObjectOptions, frozen=True, kw_only=True):
    """Options of a secret.

    Args:
        data: the secret itself.
        file: the file that holds it, all its bytes.
        format: `raw`, or `base64` for bytes that are no text.
        keyid: the secret that it is encrypted with (AES-256-CBC, PKCS #7 padding).
        iv: the initialisation vector of that, 16 bytes in base64.
    """

    data: str | None = None
    file: str | None = None
    format: Literal["raw", "base64"] = "raw"
    keyid: str | None = None
    iv: str | None = None

    def __repr__(self) -> str:
        return f"SecretOptions(id={self.id!r})"


class Secret(UserObject):
    """Bytes that nobody is shown."""

    kind = "secret"
    Options: ClassVar[type[ObjectOptions]] = SecretOptions

    def __init__(self, options: ObjectOptions, objects: Objects) -> None:
        super().__init__(options, objects)
        assert isinstance(options, SecretOptions)
        content = self._loaded(options)
        if options.format == "base64":
            content = self._decoded(content, "the secret")
        if options.keyid is not None:
            content = self._decrypted(content, options.keyid, options.iv, objects)
        elif options.iv is not None:
            raise OptionError(f"secret {self.id!r}: iv has a meaning only together with keyid")
        self._content = content

    def __repr__(self) -> str:
        return f"Secret(id={self.id!r})"

    def reveal(self) -> bytes:
        """The secret itself."""
        return self._content

    def passphrase(self) -> bytes:
        """The secret, which must be text, as UTF-8.

        Raises:
            OptionError: it is not; QEMU takes no other passphrases.
        """
        try:
            text = self._content.decode()
        except UnicodeDecodeError:
            text = "\0"
        if "\0" in text:
            raise OptionError(f"secret {self.id!r}: a passphrase must be UTF-8 without NUL characters")
        return self._content

    def _loaded(self, options: SecretOptions) -> bytes:
        if (options.data is None) == (options.file is None):
            raise OptionError(f"secret {self.id!r}: give either data or file")
        if options.data is not None:
            content = options.data.encode(errors="surrogateescape")
        else:
            assert options.file is not None
            try:
                with Path(options.file).open("rb") as file:
                    content = file.read(MAX_SECRET_BYTES + 1)
            except OSError as problem:
                raise OSError(
                    problem.errno, f"secret {self.id!r}: {options.file}: {problem.strerror or problem}"
                ) from None
        if len(content) > MAX_SECRET_BYTES:
            raise OptionError(f"secret {self.id!r}: more than {MAX_SECRET_BYTES} bytes")
        return content

    def _decoded(self, text: bytes, what: str) -> bytes:
        try:
            return base64.b64decode(b"".join(text.split()), validate=True)
        except binascii.Error:
            raise OptionError(f"secret {self.id!r}: {what} is no base64") from None

    def _decrypted(self, content: bytes, keyid: str, iv: str | None, objects: Objects) -> bytes:
        key = objects.find(keyid, Secret).reveal()
        if len(key) != KEY_BYTES:
            raise OptionError(f"secret {self.id!r}: keyid {keyid!r} has {len(key)} bytes, expected {KEY_BYTES}")
        vector = self._decoded((iv or "").encode(errors="replace"), "iv")
        if len(vector) != AES_BLOCK_BYTES:
            raise OptionError(f"secret {self.id!r}: iv must be {AES_BLOCK_BYTES} bytes in base64; it has {len(vector)}")
        if not content or len(content) % AES_BLOCK_BYTES:
            raise OptionError(
                f"secret {self.id!r}: {len(content)} encrypted bytes are no multiple of {AES_BLOCK_BYTES}"
            )
        padded = aes_decryptor(key, "cbc", vector).update(content)
        padding = padded[-1]
        if not 1 <= padding <= AES_BLOCK_BYTES or padded[-padding:] != bytes([padding]) * padding:
            raise OptionError(f"secret {self.id!r}: it was not encrypted with {keyid!r} and this iv")
        return padded[:-padding]

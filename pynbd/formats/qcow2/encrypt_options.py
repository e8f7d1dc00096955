"""Options of encrypted images, apart from what encrypts: they are needed for images that are not, too."""

from typing import Annotated, Literal

import msgspec

IterTime = Annotated[int, msgspec.Meta(ge=1, le=3_600_000)]


class EncryptOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """How an encrypted image is opened.

    Args:
        format: as in the image; `luks` or `aes`. It need not be given.
        key_secret: the secret with the passphrase; without it the image can be looked at, but not read.
    """

    format: Literal["luks", "aes"] | None = None
    key_secret: str | None = None


class EncryptCreationOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """How a new image is encrypted.

    Args:
        format: `luks`, or the `aes` of old images, which is weak.
        key_secret: the secret with the passphrase.
        cipher_alg: `aes-128`, `aes-192`, `aes-256`.
        cipher_mode: `xts`, `cbc`, `ctr`, `ecb`.
        ivgen_alg: `plain64`, `plain`, `essiv`.
        ivgen_hash_alg: of `essiv`.
        hash_alg: of PBKDF2.
        iter_time: milliseconds that each try of a passphrase takes on this machine.
    """

    format: Literal["luks", "aes"] | None = None
    key_secret: str = ""
    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str = ""
    hash_alg: str = "sha256"
    iter_time: IterTime = 2000


class EncryptAmendOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A change of key slots, of images encrypted by LUKS.

    Args:
        format: `luks`; it need not be given.
        state: what becomes of the slots: `active` puts a passphrase into one, `inactive` erases.
        keyslot: which slot; a free one is found if it is not given.
        new_secret: the secret with the new passphrase (active).
        old_secret: erase all slots that this passphrase opens (inactive).
        iter_time: milliseconds that each try of the new passphrase takes.
    """

    state: Literal["active", "inactive"]
    format: Literal["luks"] = "luks"
    keyslot: int | None = None
    new_secret: str | None = None
    old_secret: str | None = None
    iter_time: IterTime | None = None

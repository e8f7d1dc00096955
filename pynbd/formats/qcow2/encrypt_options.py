"""Options of encrypted images, apart from what encrypts: they are needed for images that are not, too."""

from typing import Literal

import msgspec

from pynbd.crypto.luks_options import LuksAmendOptions, LuksOptions


class EncryptOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """How an encrypted image is opened.

    Args:
        format: as in the image; `luks` or `aes`. It need not be given.
        key_secret: the secret with the passphrase; without it the image can be looked at, but not read.
    """

    format: Literal["luks", "aes"] | None = None
    key_secret: str | None = None


class EncryptCreationOptions(LuksOptions, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """How a new image is encrypted; all but the passphrase counts for LUKS alone.

    Args:
        format: `luks`, or the `aes` of old images, which is weak.
        key_secret: the secret with the passphrase.
    """

    format: Literal["luks", "aes"] | None = None


class EncryptAmendOptions(LuksAmendOptions, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A change of key slots, of images encrypted by LUKS.

    Args:
        format: `luks`; it need not be given.
    """

    format: Literal["luks"] = "luks"

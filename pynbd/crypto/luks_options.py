"""What a LUKS container takes, apart from what makes it: all who offer these options need them, also without the
library of ciphers.
"""

from typing import Annotated, Literal

import msgspec

SLOTS = 8
"""Key slots of a container."""

DEFAULT_ITER_TIME_MS = 2000
MAX_ITER_TIME_MS = 600_000
"""Ten minutes for each try of a passphrase."""

IterTime = Annotated[int, msgspec.Meta(ge=0, le=MAX_ITER_TIME_MS)]
"""Milliseconds; 0 for as few iterations as there may be."""


class LuksOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """What a new container takes, by the names of `qemu-img create -f luks -o`.

    Args:
        key_secret: the secret with the passphrase of the first key slot.
        cipher_alg: `aes-128`, `aes-192`, `aes-256`.
        cipher_mode: `xts`, `cbc`, `ctr`, `ecb`.
        ivgen_alg: `plain64`, `plain`, `essiv`.
        ivgen_hash_alg: of `essiv`; `sha256` if not given.
        hash_alg: of PBKDF2 and of the splitter.
        iter_time: milliseconds that each try of a passphrase takes on this machine.
    """

    key_secret: str = ""
    cipher_alg: str = "aes-256"
    cipher_mode: str = "xts"
    ivgen_alg: str = "plain64"
    ivgen_hash_alg: str = ""
    hash_alg: str = "sha256"
    iter_time: IterTime = DEFAULT_ITER_TIME_MS


class LuksAmendOptions(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """Changes of key slots, by the names of `qemu-img amend -f luks -o`.

    Args:
        state: what becomes of the slots: `active` puts a passphrase into one, `inactive` erases.
        keyslot: which slot; a free one is found if it is not given.
        new_secret: the secret with the new passphrase (active).
        old_secret: erase all slots that this passphrase opens (inactive).
        iter_time: milliseconds that each try of the new passphrase takes.
    """

    state: Literal["active", "inactive"]
    keyslot: Annotated[int, msgspec.Meta(ge=0, lt=SLOTS)] | None = None
    new_secret: str | None = None
    old_secret: str | None = None
    iter_time: IterTime | None = None

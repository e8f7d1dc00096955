"""What a LUKS1 container looks like on disk (LUKS On-Disk Format Specification, version 1.2.3). All is big-endian.

A header of 592 bytes with eight key slots in it; for each slot an area of key material; then the payload. Offsets are
in sectors of 512 bytes.
"""

import itertools
from typing import Any

import msgspec
from construct import Bytes, ConstructError, Int16ub, Int32ub, Struct

from pynbd.block.alignment import round_up
from pynbd.block.errors import ImageError
from pynbd.crypto.ciphers import AES_KEY_BYTES, CipherSpec
from pynbd.crypto.luks_options import SLOTS

MAGIC = b"LUKS\xba\xbe"
VERSION = 1

SECTOR_BYTES = 512
STRIPES = 4000
"""Into how many pieces a master key is split; the specification gives no other number, and QEMU takes no other."""

SLOT_ENABLED = 0x00AC71F3
SLOT_DISABLED = 0x0000DEAD

SALT_BYTES = 32
DIGEST_BYTES = 20

SLOT_ALIGNMENT_SECTORS = 8
"""Key material begins at multiples of 4096 bytes, the first of them behind the header."""

MIN_ITERATIONS = 1000
"""As the specification and QEMU have it, however little time is given."""

MAX_ITERATIONS = 1 << 29
"""Iterations that a wrong passphrase may take, all slots together: some minutes' work."""

MAX_KEY_BYTES = 512
"""More than any cipher takes; a header that says more is broken."""

MAX_PAYLOAD_SECTORS = (1 << 32) - 1

KEY_SLOT = Struct(
    "state" / Int32ub,
    "iterations" / Int32ub,
    "salt" / Bytes(SALT_BYTES),
    "key_material_sector" / Int32ub,
    "stripes" / Int32ub,
)

HEADER = Struct(
    "magic" / Bytes(len(MAGIC)),
    "version" / Int16ub,
    "cipher_name" / Bytes(32),
    "cipher_mode" / Bytes(32),
    "hash_spec" / Bytes(32),
    "payload_sector" / Int32ub,
    "key_bytes" / Int32ub,
    "digest" / Bytes(DIGEST_BYTES),
    "digest_salt" / Bytes(SALT_BYTES),
    "digest_iterations" / Int32ub,
    "uuid" / Bytes(40),
    "slots" / KEY_SLOT[SLOTS],
)

HEADER_BYTES: int = HEADER.sizeof()
SLOT_ENTRY_BYTES: int = KEY_SLOT.sizeof()
SLOT_ENTRIES_OFFSET = HEADER_BYTES - SLOTS * SLOT_ENTRY_BYTES


class KeySlot(msgspec.Struct, frozen=True, kw_only=True):
    """One key slot.

    Args:
        active: whether a passphrase opens it.
        iterations, salt: of PBKDF2.
        key_material_sector: where the split and encrypted master key lies, in sectors from the header on.
    """

    active: bool = False
    iterations: int = 0
    salt: bytes = bytes(SALT_BYTES)
    key_material_sector: int


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """A header, as far as it is sound by itself; whether there are such a cipher and such a hash is another question.

    Args:
        cipher_name, cipher_mode, hash_spec: as LUKS has them: `aes`, `xts-plain64`, `sha256`.
        payload_sector: where the payload begins, in sectors from the header on; 0 if it lies elsewhere.
        key_bytes: length of the master key.
        digest, digest_salt, digest_iterations: what the right master key gives by PBKDF2.
        uuid: of the container.
        slots: eight of them.
    """

    cipher_name: str
    cipher_mode: str
    hash_spec: str
    payload_sector: int
    key_bytes: int
    digest: bytes
    digest_salt: bytes
    digest_iterations: int
    uuid: str
    slots: tuple[KeySlot, ...]

    @property
    def cipher(self) -> CipherSpec:
        """The cipher in QEMU's words; its `check` tells whether there is one."""
        mode, _, ivgen = self.cipher_mode.partition("-")
        ivgen, _, hash_name = ivgen.partition(":")
        bits = self.key_bytes * 8 // (2 if mode == "xts" else 1)
        if mode == "ecb" and not ivgen:
            ivgen = "plain"  # which means nothing to it
        return CipherSpec(
            cipher_alg=f"{self.cipher_name}-{bits}", cipher_mode=mode, ivgen_alg=ivgen, ivgen_hash_alg=hash_name
        )


def key_material_sectors(key_bytes: int) -> int:
    """Sectors of the key material of one slot."""
    return -(-key_bytes * STRIPES // SECTOR_BYTES)


def slot_sectors(key_bytes: int) -> tuple[list[int], int]:
    """Where QEMU and cryptsetup lay key material: (the first sector of each slot, the first one after all of them)."""
    stride = round_up(key_material_sectors(key_bytes), SLOT_ALIGNMENT_SECTORS)
    starts = [SLOT_ALIGNMENT_SECTORS + number * stride for number in range(SLOTS)]
    return starts, starts[-1] + stride


def header_names(spec: CipherSpec) -> tuple[str, str]:
    """(cipher name, cipher mode) as LUKS has them: `aes`, `cbc-essiv:sha256`."""
    assert spec.cipher_alg in AES_KEY_BYTES
    suffix = f":{spec.ivgen_hash_alg}" if spec.ivgen_alg == "essiv" else ""
    return spec.cipher_alg.partition("-")[0], f"{spec.cipher_mode}-{spec.ivgen_alg}{suffix}"


def total_iterations(header: Header) -> int:
    """How many iterations it takes to find that a passphrase opens no slot."""
    return sum(slot.iterations + header.digest_iterations for slot in header.slots if slot.active)


def build_slot(slot: KeySlot) -> bytes:
    """The 48 bytes of a slot."""
    built: bytes = KEY_SLOT.build(
        {
            "state": SLOT_ENABLED if slot.active else SLOT_DISABLED,
            "iterations": slot.iterations,
            "salt": slot.salt,
            "key_material_sector": slot.key_material_sector,
            "stripes": STRIPES,
        }
    )
    return built


def build_header(header: Header) -> bytes:
    """The 592 bytes of a header."""
    front = {name: getattr(header, name) for name in header.__struct_fields__}
    for name, length in (("cipher_name", 32), ("cipher_mode", 32), ("hash_spec", 32), ("uuid", 40)):
        front[name] = front[name].encode("ascii").ljust(length, b"\0")
        assert len(front[name]) == length
        assert front[name].endswith(b"\0")
    slots = [KEY_SLOT.parse(build_slot(slot)) for slot in header.slots]
    built: bytes = HEADER.build({**front, "magic": MAGIC, "version": VERSION, "slots": slots})
    return built


def parse_header(data: bytes, image: str) -> Header:
    """The header of a container.

    Args:
        data: its first bytes, `HEADER_BYTES` of them.
        image: the name of the file, for messages.

    Raises:
        ImageError: it is no header of LUKS1, or a broken one; where, and what was found.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise ImageError(image, f"no LUKS container: found {bytes(data[: len(MAGIC)])!r}, expected {MAGIC!r}", 0)
    try:
        raw = HEADER.parse(data)
    except ConstructError:
        raise ImageError(image, f"a LUKS header of {len(data)} bytes, expected {HEADER_BYTES}", 0) from None
    if raw.version != VERSION:
        raise ImageError(image, f"version {raw.version} of LUKS is not supported, only {VERSION}", 6)
    for name, value, least, most, offset in (
        ("key-bytes", raw.key_bytes, 1, MAX_KEY_BYTES, 108),
        ("mk-digest-iter", raw.digest_iterations, 1, MAX_ITERATIONS, 164),
    ):
        if not least <= value <= most:
            raise ImageError(image, f"LUKS header: {name} is {value}, expected {least} to {most}", offset)
    header = Header(
        cipher_name=_text(raw.cipher_name, image, "cipher-name", 8),
        cipher_mode=_text(raw.cipher_mode, image, "cipher-mode", 40),
        hash_spec=_text(raw.hash_spec, image, "hash-spec", 72),
        payload_sector=raw.payload_sector,
        key_bytes=raw.key_bytes,
        digest=raw.digest,
        digest_salt=raw.digest_salt,
        digest_iterations=raw.digest_iterations,
        uuid=_text(raw.uuid, image, "uuid", 168),
        slots=tuple(_slot(slot, number, image) for number, slot in enumerate(raw.slots)),
    )
    _check_areas(header, image)
    total = total_iterations(header)
    if total > MAX_ITERATIONS:
        raise ImageError(image, f"LUKS header: {total} iterations in all, at most {MAX_ITERATIONS} are made", 164)
    return header


def _text(raw: bytes, image: str, name: str, offset: int) -> str:
    text, nul, _ = raw.partition(b"\0")
    if not nul or not text.isascii() or not text.decode("ascii").isprintable():
        raise ImageError(image, f"LUKS header: {name} is no text that ends with a NUL: {raw!r}", offset)
    return text.decode("ascii")


def _slot(raw: Any, number: int, image: str) -> KeySlot:
    offset = SLOT_ENTRIES_OFFSET + number * SLOT_ENTRY_BYTES
    if raw.state not in (SLOT_ENABLED, SLOT_DISABLED):
        found = f"{raw.state:#010x}, expected {SLOT_ENABLED:#010x} or {SLOT_DISABLED:#010x}"
        raise ImageError(image, f"LUKS key slot {number}: its state is {found}", offset)
    active = raw.state == SLOT_ENABLED
    if active and not raw.iterations:
        raise ImageError(image, f"LUKS key slot {number} is active, but has no iterations", offset + 4)
    if raw.stripes != STRIPES:
        raise ImageError(image, f"LUKS key slot {number} has {raw.stripes} stripes, expected {STRIPES}", offset + 44)
    return KeySlot(active=active, iterations=raw.iterations, salt=raw.salt, key_material_sector=raw.key_material_sector)


def _check_areas(header: Header, image: str) -> None:
    """Check that header, key material and payload do not overlap."""
    length = key_material_sectors(header.key_bytes)
    taken = [(0, -(-HEADER_BYTES // SECTOR_BYTES), "the header")]
    for number, slot in enumerate(header.slots):
        taken.append((slot.key_material_sector, slot.key_material_sector + length, f"key slot {number}"))
    if header.payload_sector:
        taken.append((header.payload_sector, MAX_PAYLOAD_SECTORS + 1, "the payload"))
    taken.sort()
    for (_, end, what), (start, _, other) in itertools.pairwise(taken):
        if start < end:
            offset = start * SECTOR_BYTES
            raise ImageError(image, f"LUKS header: {other} begins at offset {offset}, inside of {what}", 104)

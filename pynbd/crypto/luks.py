"""`Luks`: a LUKS1 container, wherever its header lies: at the beginning of a file, or in clusters of a qcow2 image.

    luks = await Luks.load(store, "disk.luks")
    cipher = await luks.unlock(passphrase)              # a SectorCipher, see `ciphers`
    await luks.amend(changes, objects, passphrase)

The master key encrypts the payload, and is kept in up to eight key slots, each opened by a passphrase. What is slow
(PBKDF2, splitting keys) is done in threads; nothing of it can be broken off once it has begun.

Key material reaches the disk before the header says that it is there, and the header says that a slot is gone before
its key material is destroyed. A slot is switched on and off by a write of four bytes, which no disk tears.
"""

import asyncio
import os
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from pynbd.block.errors import BlockError, ImageError, OptionError
from pynbd.block.objects import Objects
from pynbd.crypto import antiforensic, layout
from pynbd.crypto.ciphers import CipherSpec, SectorCipher, make_cipher
from pynbd.crypto.hashes import check_hash, derive_key, iterations_in
from pynbd.crypto.layout import Header, KeySlot
from pynbd.crypto.luks_options import DEFAULT_ITER_TIME_MS, SLOTS, LuksAmendOptions, LuksOptions
from pynbd.crypto.secrets import Secret

DIGEST_SHARE = 8
"""The digest of the master key takes an eighth of the time of a slot, as in QEMU."""


class HeaderStore(Protocol):
    """Where a header and its key material are kept. Offsets are in bytes from the header on."""

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            OSError: they could not be read, or there are fewer.
        """

    async def write(self, offset: int, data: bytes) -> None:
        """Put bytes there. Raises OSError."""

    async def flush(self) -> None:
        """Make what was written durable. Raises OSError."""


def cipher_of(options: LuksOptions) -> CipherSpec:
    """The cipher of a new container.

    Raises:
        OptionError: there is no such cipher.
    """
    hash_name = (options.ivgen_hash_alg or "sha256") if options.ivgen_alg == "essiv" else ""
    spec = CipherSpec(
        cipher_alg=options.cipher_alg,
        cipher_mode=options.cipher_mode,
        ivgen_alg=options.ivgen_alg,
        ivgen_hash_alg=hash_name,
    )
    spec.check()
    return spec


def header_bytes(options: LuksOptions) -> int:
    """How many bytes header and key material of a new container take: its payload offset.

    Raises:
        OptionError: there is no such cipher.
    """
    return layout.slot_sectors(cipher_of(options).key_bytes)[1] * layout.SECTOR_BYTES


class Luks:
    """An open container; `load` and `create` make one.

    Args:
        store: keeps the header.
        header: as it stands there.
        image: the name of the file, for messages.
    """

    def __init__(self, store: HeaderStore, header: Header, image: str) -> None:
        self._store = store
        self._image = image
        self._changing = asyncio.Lock()
        self.header = header

    @classmethod
    async def load(cls, store: HeaderStore, image: str) -> "Luks":
        """Read the header. No passphrase is needed for that.

        Raises:
            ImageError: it is none, or broken. OSError: it can't be read.
        """
        return cls(store, layout.parse_header(await store.read(0, layout.HEADER_BYTES), image), image)

    @classmethod
    async def create(cls, store: HeaderStore, options: LuksOptions, passphrase: bytes, image: str) -> "Luks":
        """Write a new header, with a new master key that a passphrase opens by slot 0.

        Args:
            store: keeps it; `header_bytes(options)` bytes are taken.
            options: what it is to be.
            passphrase: of the first slot.
            image: the name of the file, for messages.

        Raises:
            OptionError: a cipher or a hash is not there. OSError: it could not be written; the store holds anything.
        """
        spec = cipher_of(options)
        check_hash(options.hash_alg, "hash-alg")
        key = os.urandom(spec.key_bytes)
        make_cipher(spec, key)
        starts, payload = layout.slot_sectors(spec.key_bytes)
        cipher_name, cipher_mode = layout.header_names(spec)
        per_slot, per_digest = await asyncio.to_thread(_iterations, options.hash_alg, spec.key_bytes, options.iter_time)
        _check_total(per_slot + per_digest)
        salt = os.urandom(layout.SALT_BYTES)
        header = Header(
            cipher_name=cipher_name,
            cipher_mode=cipher_mode,
            hash_spec=options.hash_alg,
            payload_sector=payload,
            key_bytes=spec.key_bytes,
            digest=await asyncio.to_thread(_digest, options.hash_alg, key, salt, per_digest),
            digest_salt=salt,
            digest_iterations=per_digest,
            uuid=str(uuid.uuid4()),
            slots=tuple(KeySlot(key_material_sector=start) for start in starts),
        )
        await store.write(0, layout.build_header(header))
        luks = cls(store, header, image)
        await luks._fill_slot(0, key, passphrase, per_slot)
        return luks

    @property
    def payload_offset(self) -> int:
        """Where the payload begins, in bytes from the header on (where it follows the header at all)."""
        return self.header.payload_sector * layout.SECTOR_BYTES

    def active_slots(self) -> list[int]:
        """The slots that some passphrase opens."""
        return [number for number, slot in enumerate(self.header.slots) if slot.active]

    def describe(self) -> dict[str, Any]:
        """What QEMU tells of a container (`QCryptoBlockInfoLUKS`), in its names and its order."""
        header, spec = self.header, self.header.cipher
        told: dict[str, Any] = {
            "ivgen-alg": spec.ivgen_alg,
            "hash-alg": header.hash_spec,
            "cipher-alg": spec.cipher_alg,
            "uuid": header.uuid,
        }
        if spec.ivgen_hash_alg:
            told["ivgen-hash-alg"] = spec.ivgen_hash_alg
        told["cipher-mode"] = spec.cipher_mode
        told["slots"] = [self._describe_slot(slot) for slot in header.slots]
        told["payload-offset"] = self.payload_offset
        told["master-key-iters"] = header.digest_iterations
        return told

    @staticmethod
    def _describe_slot(slot: KeySlot) -> dict[str, Any]:
        told: dict[str, Any] = {"active": slot.active}
        if slot.active:
            told["iters"] = slot.iterations
        told["key-offset"] = slot.key_material_sector * layout.SECTOR_BYTES
        if slot.active:
            told["stripes"] = layout.STRIPES
        return told

    # --- opening ------------------------------------------------------------------------------------------

    def check_supported(self) -> None:
        """Check that the payload's cipher and the hash are there.

        Raises:
            BlockError: one is not, by its name.
        """
        try:
            self.header.cipher.check()
            check_hash(self.header.hash_spec, "hash-alg")
            if self.header.cipher.key_bytes != self.header.key_bytes:
                raise OptionError(
                    f"key-bytes: {self.header.key_bytes} does not go with {self.header.cipher.cipher_alg}"
                )
        except OptionError as problem:
            raise BlockError(f"{self._image}: {problem}") from None

    async def unlock(self, passphrase: bytes) -> SectorCipher:
        """The cipher of the payload.

        Args:
            passphrase: all slots are tried.

        Raises:
            BlockError: it opens none, or the cipher or the hash is not there.
            OSError: key material could not be read.
        """
        return make_cipher(self.header.cipher, await self._master_key(passphrase))

    async def _master_key(self, passphrase: bytes) -> bytes:
        self.check_supported()
        active = self.active_slots()
        if not active:
            raise BlockError(f"{self._image}: no key slot is active: what it held can't be read any more")
        for number in active:
            key = await self._open_slot(number, passphrase)
            if key is not None:
                return key
        slots = ", ".join(map(str, active))
        raise BlockError(f"{self._image}: the passphrase opens none of the key slots in use ({slots})")

    async def _open_slot(self, number: int, passphrase: bytes) -> bytes | None:
        """The master key, if a passphrase opens this slot."""
        header, slot = self.header, self.header.slots[number]
        length = layout.key_material_sectors(header.key_bytes) * layout.SECTOR_BYTES
        material = bytearray(await self._store.read(slot.key_material_sector * layout.SECTOR_BYTES, length))
        if len(material) != length:
            offset = slot.key_material_sector * layout.SECTOR_BYTES
            found = f"{len(material)} bytes of key material, expected {length}"
            raise ImageError(self._image, f"LUKS key slot {number}: {found}", offset)
        return await asyncio.to_thread(_key_of_slot, header, slot, material, passphrase)

    # --- changing slots -----------------------------------------------------------------------------------

    async def amend(
        self, changes: LuksAmendOptions, objects: Objects, passphrase: bytes | None, *, force: bool = False
    ) -> None:
        """Put a passphrase into a key slot, or erase slots.

        Args:
            changes: what to do.
            objects: has the secrets that the changes name.
            passphrase: one that opens the container now; None if nobody gave one.
            force: erase also what alone opens the container, and fill a slot that is in use.

        Raises:
            OptionError: the changes contradict each other, or would leave nothing that opens the container.
            BlockError: a passphrase opens no slot.
            OSError: it could not be written; a slot that was to be filled is not active, one that was to be erased may
                still be. Where one in use was to be filled, another one may be active that the new passphrase opens.
        """
        async with self._changing:
            if changes.state == "active":
                await self._activate(changes, objects, passphrase, force=force)
            else:
                await self._erase(changes, objects, force=force)

    async def _activate(
        self, changes: LuksAmendOptions, objects: Objects, passphrase: bytes | None, *, force: bool
    ) -> None:
        if changes.new_secret is None:
            raise OptionError("new-secret: which passphrase is to open the key slot?")
        if changes.old_secret is not None:
            raise OptionError("old-secret: it says which key slots to erase, not which to fill")
        new = objects.find(changes.new_secret, Secret).passphrase()
        number = self._slot_to_fill(changes.keyslot, force=force)
        if passphrase is None:
            raise OptionError(f"{self._image}: to fill a key slot takes a passphrase that opens another (key-secret)")
        key = await self._master_key(passphrase)
        time_ms = DEFAULT_ITER_TIME_MS if changes.iter_time is None else changes.iter_time
        iterations, _ = await asyncio.to_thread(_iterations, self.header.hash_spec, self.header.key_bytes, time_ms)
        if number in self.active_slots():
            await self._replace_slot(number, key, new, iterations)
        else:
            await self._fill_slot(number, key, new, iterations)

    def _slot_to_fill(self, wanted: int | None, *, force: bool) -> int:
        free = [number for number in range(SLOTS) if number not in self.active_slots()]
        if wanted is None:
            if not free:
                raise OptionError(f"{self._image}: all {SLOTS} key slots are in use; erase one first")
            return free[0]
        if wanted not in free and not force:
            raise OptionError(f"keyslot: {wanted} is in use; erase it first, or use force")
        return wanted

    async def _erase(self, changes: LuksAmendOptions, objects: Objects, *, force: bool) -> None:
        for name in ("new_secret", "iter_time"):
            if getattr(changes, name) is not None:
                raise OptionError(f"{name.replace('_', '-')}: a key slot that is erased has none")
        if changes.keyslot is None and changes.old_secret is None:
            raise OptionError("keyslot, old-secret: one of them must say which key slots to erase")
        chosen = self.active_slots() if changes.keyslot is None else [changes.keyslot]
        if changes.keyslot is not None and changes.keyslot not in self.active_slots():
            raise OptionError(f"keyslot: {changes.keyslot} is not in use")
        if changes.old_secret is not None:
            passphrase = objects.find(changes.old_secret, Secret).passphrase()
            self.check_supported()
            chosen = [number for number in chosen if await self._open_slot(number, passphrase) is not None]
            if not chosen:
                which = "any key slot" if changes.keyslot is None else f"key slot {changes.keyslot}"
                raise OptionError(f"old-secret: it does not open {which}")
        if set(chosen) == set(self.active_slots()) and not force:
            what = "that would erase the last key slot, and with it all that the disk holds"
            raise OptionError(f"{self._image}: {what}; nothing but force does that")
        await self._erase_slots(chosen)

    async def _fill_slot(self, number: int, key: bytes, passphrase: bytes, iterations: int) -> None:
        slot = KeySlot(
            active=False,
            iterations=iterations,
            salt=os.urandom(layout.SALT_BYTES),
            key_material_sector=self.header.slots[number].key_material_sector,
        )
        _check_total(
            layout.total_iterations(_with_slot(self.header, number, msgspec.structs.replace(slot, active=True)))
        )
        material = await asyncio.to_thread(_material_of_slot, self.header, slot, key, passphrase)
        await self._store.write(slot.key_material_sector * layout.SECTOR_BYTES, material)
        await self._store.write(_entry_offset(number), layout.build_slot(slot))
        await self._store.flush()
        await self._switch(number, msgspec.structs.replace(slot, active=True))

    async def _replace_slot(self, number: int, key: bytes, passphrase: bytes, iterations: int) -> None:
        """Fill a slot that is in use: on the way a spare one opens the container, for it may be the only one."""
        spare = next((other for other in range(SLOTS) if other not in self.active_slots()), None)
        if spare is not None:
            await self._fill_slot(spare, key, passphrase, iterations)
        await self._erase_slots([number])
        await self._fill_slot(number, key, passphrase, iterations)
        if spare is not None:
            await self._erase_slots([spare])

    async def _erase_slots(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            await self._switch(number, msgspec.structs.replace(self.header.slots[number], active=False))
        for number in numbers:
            empty = KeySlot(key_material_sector=self.header.slots[number].key_material_sector)
            length = layout.key_material_sectors(self.header.key_bytes) * layout.SECTOR_BYTES
            await self._store.write(empty.key_material_sector * layout.SECTOR_BYTES, os.urandom(length))
            await self._store.write(_entry_offset(number), layout.build_slot(empty))
            self.header = _with_slot(self.header, number, empty)
        await self._store.flush()

    async def _switch(self, number: int, slot: KeySlot) -> None:
        """Write the four bytes that make a slot active or not, durably."""
        await self._store.write(_entry_offset(number), layout.build_slot(slot)[:4])
        await self._store.flush()
        self.header = _with_slot(self.header, number, slot)


def _with_slot(header: Header, number: int, slot: KeySlot) -> Header:
    return msgspec.structs.replace(header, slots=(*header.slots[:number], slot, *header.slots[number + 1 :]))


def _check_total(iterations: int) -> None:
    """Nobody is to make what nobody opens.

    Raises:
        OptionError: all slots together take so many iterations that `layout.parse_header` would refuse them.
    """
    if iterations > layout.MAX_ITERATIONS:
        raise OptionError(
            f"iter-time: all key slots would take {iterations} iterations, at most {layout.MAX_ITERATIONS} are made"
        )


def _entry_offset(number: int) -> int:
    """Where the entry of a slot stands in the header."""
    return layout.SLOT_ENTRIES_OFFSET + number * layout.SLOT_ENTRY_BYTES


# --- what takes long, for threads ---------------------------------------------------------------------------


def _iterations(hash_name: str, key_bytes: int, time_ms: int) -> tuple[int, int]:
    """(of a slot, of the digest): as many iterations as a time allows."""
    check_hash(hash_name, "hash-alg")
    slot = max(iterations_in(hash_name, key_bytes, time_ms / 1000), layout.MIN_ITERATIONS)
    return slot, max(slot // DIGEST_SHARE, layout.MIN_ITERATIONS)


def _digest(hash_name: str, key: bytes, salt: bytes, iterations: int) -> bytes:
    return derive_key(hash_name, key, salt, iterations, layout.DIGEST_BYTES)


def _slot_cipher(header: Header, slot: KeySlot, passphrase: bytes) -> SectorCipher:
    slot_key = derive_key(header.hash_spec, passphrase, slot.salt, slot.iterations, header.key_bytes)
    return make_cipher(header.cipher, slot_key)


def _key_of_slot(header: Header, slot: KeySlot, material: bytearray, passphrase: bytes) -> bytes | None:
    """The master key in a slot, if the passphrase is the right one."""
    _slot_cipher(header, slot, passphrase).decrypt(0, memoryview(material))
    used = bytes(material[: header.key_bytes * layout.STRIPES])
    key = antiforensic.merge(used, header.key_bytes, header.hash_spec)
    found = _digest(header.hash_spec, key, header.digest_salt, header.digest_iterations)
    return key if found == header.digest else None


def _material_of_slot(header: Header, slot: KeySlot, key: bytes, passphrase: bytes) -> bytes:
    """The master key, split and encrypted."""
    split = antiforensic.split(key, layout.STRIPES, header.hash_spec)
    padded = split.ljust(layout.key_material_sectors(header.key_bytes) * layout.SECTOR_BYTES, b"\0")
    return bytes(_slot_cipher(header, slot, passphrase).encrypt(0, padded))

"""Containers: made, opened, and their key slots changed so that no crash on the way locks anybody out."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from pynbd.block.errors import BlockError, ImageError, OptionError
from pynbd.block.objects import Objects
from pynbd.crypto import layout, luks
from pynbd.crypto.ciphers import CipherSpec, SectorCipher, make_cipher
from pynbd.crypto.luks import Luks, header_bytes
from pynbd.crypto.luks_options import LuksAmendOptions, LuksOptions

FAST = LuksOptions(iter_time=1, cipher_alg="aes-128", cipher_mode="cbc")

WORDS = {"a": "alpha", "b": "beta", "c": "gamma"}


class Memory:
    """A store that remembers what was done to it, and may break."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.done: list[tuple[int, bytes] | None] = []
        self.fails_after: int | None = None

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.content[offset : offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        self._may_fail()
        self.done.append((offset, data))
        self.put(offset, data)

    async def flush(self) -> None:
        self._may_fail()
        self.done.append(None)

    def put(self, offset: int, data: bytes) -> None:
        self.content.extend(bytes(max(offset + len(data) - len(self.content), 0)))
        self.content[offset : offset + len(data)] = data

    def _may_fail(self) -> None:
        if self.fails_after is not None and len(self.done) >= self.fails_after:
            raise OSError(5, "broken")


def objects() -> Objects:
    made = Objects()
    for name, word in WORDS.items():
        made.make({"qom-type": "secret", "id": name, "data": word})
    return made


async def container(options: LuksOptions = FAST) -> tuple[Luks, Memory]:
    store = Memory()
    return await Luks.create(store, options, b"alpha", "x"), store


async def opens(content: bytes | bytearray, word: str) -> bool:
    opened = await Luks.load(Memory(bytes(content)), "x")
    try:
        await opened.unlock(word.encode())
    except BlockError:
        return False
    return True


async def change(opened: Luks, passphrase: str | None = "alpha", *, force: bool = False, **changes: Any) -> None:
    wanted = msgspec.convert({name.replace("_", "-"): value for name, value in changes.items()}, LuksAmendOptions)
    await opened.amend(wanted, objects(), passphrase.encode() if passphrase is not None else None, force=force)


@pytest.fixture(scope="module")
def ready() -> bytes:
    """A container that `alpha` opens."""
    return bytes(asyncio.run(container())[1].content)


@pytest.fixture
async def opened(ready: bytes) -> Luks:
    return await Luks.load(Memory(ready), "x")


def store_of(opened: Luks) -> Memory:
    store = opened._store
    assert isinstance(store, Memory)
    return store


# --- making and opening -------------------------------------------------------------------------------------


async def test_it_is_opened_by_its_passphrase_alone(ready: bytes) -> None:
    assert await opens(ready, "alpha")
    for wrong in ("", "alph", "alpha\n", "Alpha"):
        assert not await opens(ready, wrong)


async def test_both_ends_have_the_same_cipher() -> None:
    made, store = await container()
    again = await Luks.load(Memory(bytes(store.content)), "x")
    data = bytes(range(256)) * 4
    encrypted = (await made.unlock(b"alpha")).encrypt(7, data)
    assert (await again.unlock(b"alpha")).encrypt(7, data) == encrypted
    assert encrypted != data


async def test_it_takes_what_was_foretold() -> None:
    for options in (FAST, LuksOptions(iter_time=1), LuksOptions(iter_time=1, cipher_alg="aes-192", cipher_mode="cbc")):
        made, store = await container(options)
        assert made.payload_offset == header_bytes(options)
        assert len(store.content) <= made.payload_offset


async def test_nothing_secret_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[bytes] = []

    def seen(spec: CipherSpec, key: bytes) -> SectorCipher:
        keys.append(key)
        return make_cipher(spec, key)

    monkeypatch.setattr(luks, "make_cipher", seen)
    _, store = await container()
    assert len(keys) == 2  # the master key, and that of the slot
    for secret in (*keys, b"alpha"):
        assert secret not in store.content


async def test_iterations_follow_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(luks, "iterations_in", lambda name, length, seconds: int(4_000_000 * seconds))
    made, _ = await container(msgspec.structs.replace(FAST, iter_time=20))
    assert (made.header.slots[0].iterations, made.header.digest_iterations) == (80_000, 10_000)
    made, _ = await container()
    assert (made.header.slots[0].iterations, made.header.digest_iterations) == (4_000, 1_000)
    made, _ = await container(msgspec.structs.replace(FAST, iter_time=0))
    assert (made.header.slots[0].iterations, made.header.digest_iterations) == (1_000, 1_000)
    with pytest.raises(OptionError, match="iter-time: all key slots would take"):
        await container(msgspec.structs.replace(FAST, iter_time=600_000))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cipher_alg": "twofish-256"}, "cipher-alg: 'twofish-256' is not supported"),
        ({"hash_alg": "whirlpool"}, "hash-alg: there is no hash 'whirlpool'"),
        ({"ivgen_alg": "essiv", "ivgen_hash_alg": "sha1"}, "'sha1' gives 20 bytes"),
    ],
)
async def test_what_is_not_there_is_not_made(options: dict[str, str], said: str) -> None:
    store = Memory()
    with pytest.raises(OptionError, match=said):
        await Luks.create(store, LuksOptions(iter_time=1, **options), b"x", "x")
    assert not store.done


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cipher_name": "serpent"}, "x: cipher-alg: 'serpent-128' is not supported"),
        ({"cipher_mode": "cbc-tcw"}, "x: ivgen-alg: 'tcw' is unknown"),
        ({"hash_spec": "whirlpool"}, "x: hash-alg: there is no hash 'whirlpool'"),
        ({"key_bytes": 13}, "x: cipher-alg: 'aes-104' is unknown"),
    ],
)
async def test_what_is_not_there_is_not_opened_but_shown(opened: Luks, changes: dict[str, Any], said: str) -> None:
    header = layout.build_header(msgspec.structs.replace(opened.header, **changes))
    other = await Luks.load(Memory(header), "x")
    assert other.describe()["cipher-alg"].startswith(changes.get("cipher_name", "aes"))
    with pytest.raises(BlockError, match=said):
        await other.unlock(b"alpha")


async def test_a_wrong_passphrase_is_told_with_the_slots(opened: Luks) -> None:
    await change(opened, state="active", new_secret="b", keyslot=5, iter_time=1)
    with pytest.raises(BlockError, match=r"x: the passphrase opens none of the key slots in use \(0, 5\)"):
        await opened.unlock(b"gamma")


async def test_no_time_is_not_the_usual_time(opened: Luks) -> None:
    await change(opened, state="active", new_secret="b", keyslot=5, iter_time=0)
    assert opened.header.slots[5].iterations == 1_000


async def test_key_material_that_is_missing(ready: bytes) -> None:
    short = await Luks.load(Memory(ready[:5000]), "x")
    with pytest.raises(ImageError, match="at offset 4096: LUKS key slot 0: 904 bytes of key material, expected 64000"):
        await short.unlock(b"alpha")


async def test_no_slot_at_all(opened: Luks) -> None:
    slots = tuple(msgspec.structs.replace(slot, active=False) for slot in opened.header.slots)
    other = Luks(Memory(), msgspec.structs.replace(opened.header, slots=slots), "x")
    with pytest.raises(BlockError, match="no key slot is active"):
        await other.unlock(b"alpha")


# --- key slots ----------------------------------------------------------------------------------------------


async def test_a_second_passphrase(opened: Luks) -> None:
    await change(opened, state="active", new_secret="b", iter_time=1)
    assert opened.active_slots() == [0, 1]
    content = store_of(opened).content
    assert [await opens(content, word) for word in WORDS.values()] == [True, True, False]
    assert (await Luks.load(Memory(bytes(content)), "x")).header == opened.header


async def test_all_slots_are_filled_and_no_more(opened: Luks) -> None:
    await change(opened, state="active", new_secret="b", keyslot=6, iter_time=1)
    for _ in range(6):
        await change(opened, state="active", new_secret="b", iter_time=1)
    assert opened.active_slots() == list(range(8))
    with pytest.raises(OptionError, match="all 8 key slots are in use"):
        await change(opened, state="active", new_secret="b", iter_time=1)


async def test_erasing_leaves_nothing_of_a_slot(opened: Luks) -> None:
    await change(opened, state="active", new_secret="b", iter_time=1)
    before = store_of(opened).content[4096 : 4096 + 64000]
    await change(opened, state="inactive", keyslot=0)
    content = store_of(opened).content
    assert [await opens(content, word) for word in WORDS.values()] == [False, True, False]
    assert all(before[at : at + 16] not in content for at in range(0, 64000, 500))
    assert opened.header.slots[0] == layout.KeySlot(key_material_sector=8)


async def test_erasing_by_passphrase_takes_every_slot_that_it_opens(opened: Luks) -> None:
    for slot in (3, 4):
        await change(opened, state="active", new_secret="b", keyslot=slot, iter_time=1)
    await change(opened, None, state="inactive", old_secret="b")
    assert opened.active_slots() == [0]
    assert await opens(store_of(opened).content, "alpha")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "active"}, "new-secret: which passphrase"),
        ({"state": "active", "new-secret": "b", "old-secret": "a"}, "old-secret: it says which key slots to erase"),
        ({"state": "active", "new-secret": "b", "keyslot": 0}, "keyslot: 0 is in use; erase it first"),
        ({"state": "active", "new-secret": "none"}, "there is no secret 'none'"),
        ({"state": "inactive"}, "keyslot, old-secret: one of them must say"),
        ({"state": "inactive", "keyslot": 0}, "that would erase the last key slot"),
        ({"state": "inactive", "old-secret": "a"}, "that would erase the last key slot"),
        ({"state": "inactive", "keyslot": 1}, "keyslot: 1 is not in use"),
        ({"state": "inactive", "old-secret": "b"}, "old-secret: it does not open any key slot"),
        ({"state": "inactive", "keyslot": 0, "old-secret": "b"}, "old-secret: it does not open key slot 0"),
        ({"state": "inactive", "keyslot": 0, "new-secret": "b"}, "new-secret: a key slot that is erased has none"),
        ({"state": "inactive", "keyslot": 0, "iter-time": 5}, "iter-time: a key slot that is erased has none"),
    ],
)
async def test_changes_that_are_refused_change_nothing(opened: Luks, changes: dict[str, Any], said: str) -> None:
    before = opened.header
    with pytest.raises(OptionError) as caught:
        await opened.amend(msgspec.convert(changes, LuksAmendOptions), objects(), b"alpha")
    assert said in str(caught.value)
    assert opened.header == before
    assert not store_of(opened).done


async def test_a_slot_in_use_is_filled_by_force(opened: Luks) -> None:
    await change(opened, state="active", new_secret="b", keyslot=0, iter_time=1, force=True)
    assert opened.active_slots() == [0], "the spare slot is still active"
    content = store_of(opened).content
    assert [await opens(content, word) for word in WORDS.values()] == [False, True, False]
    assert (await Luks.load(Memory(bytes(content)), "x")).header == opened.header


async def test_a_slot_is_filled_by_force_where_none_is_spare(opened: Luks) -> None:
    for _ in range(7):
        await change(opened, state="active", new_secret="b", iter_time=1)
    await change(opened, state="active", new_secret="c", keyslot=0, iter_time=1, force=True)
    assert opened.active_slots() == list(range(8))
    content = store_of(opened).content
    assert [await opens(content, word) for word in WORDS.values()] == [False, True, True]


async def test_the_last_slot_is_erased_by_force(opened: Luks) -> None:
    await change(opened, state="inactive", keyslot=0, force=True)
    assert opened.active_slots() == []


async def test_filling_a_slot_takes_a_passphrase(opened: Luks) -> None:
    with pytest.raises(OptionError, match=r"takes a passphrase that opens another \(key-secret\)"):
        await change(opened, None, state="active", new_secret="b")
    with pytest.raises(BlockError, match="opens none of the key slots"):
        await change(opened, "beta", state="active", new_secret="b")


@pytest.mark.parametrize("by_force", [False, True])
async def test_no_crash_locks_anybody_out(by_force: bool, opened: Luks, ready: bytes) -> None:
    """After each prefix of what was written, and any part of what was not flushed yet, `alpha` or `beta` opens."""
    if by_force:
        await change(opened, state="active", new_secret="b", keyslot=0, iter_time=1, force=True)
    else:
        await change(opened, state="active", new_secret="b", keyslot=6, iter_time=1)
        await change(opened, state="inactive", keyslot=0)
    durable = Memory(ready)
    pending: list[tuple[int, bytes]] = []
    for event in store_of(opened).done:
        if event is not None:
            pending.append(event)
        else:
            for offset, data in pending:
                durable.put(offset, data)
            pending = []
        for chosen in range(1 << len(pending)):
            crashed = Memory(bytes(durable.content))
            for number, (offset, data) in enumerate(pending):
                if chosen >> number & 1:
                    crashed.put(offset, data)
            assert await opens(crashed.content, "alpha") or await opens(crashed.content, "beta")
    assert not pending
    assert durable.content == store_of(opened).content


async def test_what_could_not_be_written_is_not_believed(opened: Luks) -> None:
    store = store_of(opened)
    for fails_after in range(5):
        store.done, store.fails_after = [], fails_after
        with pytest.raises(OSError, match="broken"):
            await change(opened, state="active", new_secret="b", iter_time=1)
        assert opened.active_slots() == [0]
    store.done, store.fails_after = [], None
    await change(opened, state="active", new_secret="b", iter_time=1)
    assert await opens(store.content, "beta")


async def test_changes_wait_for_each_other(opened: Luks) -> None:
    await asyncio.gather(*(change(opened, state="active", new_secret="b", iter_time=1) for _ in range(4)))
    assert opened.active_slots() == [0, 1, 2, 3, 4]
    assert (await Luks.load(Memory(bytes(store_of(opened).content)), "x")).header == opened.header

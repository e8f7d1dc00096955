"""Options of an existing image, changed (`pynbd img amend`).

Each change is complete before the next one begins, and ends with one write of the header's first sector.
"""

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pynbd.block import options as opt
from pynbd.block.driver import Preallocation
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.families import Progress
from pynbd.block.options import OnOff, Size
from pynbd.formats.qcow2 import downgrade, layout, resizing
from pynbd.formats.qcow2.creation import COMPATS, counting_clusters
from pynbd.formats.qcow2.encrypt_options import EncryptAmendOptions
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.layout import Autoclear, Compatible, CryptMethod, Incompatible
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.refcounts import TYPECODES, Refcounts, pack
from pynbd.formats.qcow2.tables import to_disk

if TYPE_CHECKING:
    from pynbd.formats.qcow2.driver import Qcow2


SPARE_CLUSTERS = 64
"""So many clusters more than are in use can be counted with a new width: for what is taken meanwhile."""

MAX_TRIES = 8
"""How often room for the counts is looked for, when more than the spare clusters were taken meanwhile."""


class Qcow2AmendOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What can be changed. What is not given stays.

    Args:
        compat: version of the format.
        size: length of the disk in bytes.
        backing_file: what shows through where the image holds nothing.
        backing_fmt: its format.
        data_file: the name of the file with the guest's bytes, for images that have one.
        data_file_raw: can only be switched off.
        lazy_refcounts: write reference counts late.
        refcount_bits: of a reference count.
        encrypt: fill or erase a key slot.
    """

    compat: Literal["0.10", "v2", "1.1", "v3"] | None = None
    size: Size | None = None
    backing_file: str | None = None
    backing_fmt: str | None = None
    data_file: str | None = None
    data_file_raw: OnOff | None = None
    lazy_refcounts: OnOff | None = None
    refcount_bits: int | None = None
    encrypt: EncryptAmendOptions | None = None


async def amend(driver: "Qcow2", changes: Mapping[str, Any], progress: Progress, *, force: bool) -> None:
    """Change some options; see `Amendable.amend`. The node is drained meanwhile."""
    wanted = opt.convert(changes, Qcow2AmendOptions, driver=driver.name)
    image, header = driver.image, driver.header
    image.check_fence()
    version = COMPATS[wanted.compat] if wanted.compat is not None else header.version
    await _check(driver, wanted, version)
    if version > header.version:
        await _upgrade(driver)
    if wanted.encrypt is not None:
        await _amend_keys(driver, wanted.encrypt, force=force)
    if wanted.data_file is not None or wanted.data_file_raw is not None:
        await _change_data_file(driver, wanted)
    if wanted.lazy_refcounts is not None or (version < 3 and header.lazy_refcounts):
        await _set_lazy(driver, on=bool(wanted.lazy_refcounts))
    if wanted.refcount_bits is not None and wanted.refcount_bits != header.refcount_bits:
        await change_refcount_bits(driver, wanted.refcount_bits, progress)
    if wanted.backing_file is not None or wanted.backing_fmt is not None:
        name, kind = driver.backing_name()
        name = name if wanted.backing_file is None else wanted.backing_file
        await resizing.change_backing_file(driver, name, kind if wanted.backing_fmt is None else wanted.backing_fmt)
    if wanted.size is not None and wanted.size != driver.size:
        await driver.node.truncate(wanted.size, Preallocation.OFF)
    if version < header.version:
        await downgrade.carry_out(driver, progress)
    progress(1, 1)


async def _check(driver: "Qcow2", wanted: Qcow2AmendOptions, version: int) -> None:
    """Whether all changes can be made, before any of them is.

    Raises:
        OptionError: one can't.
    """
    header = driver.header
    bits = header.refcount_bits if wanted.refcount_bits is None else wanted.refcount_bits
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise OptionError(f"refcount_bits: {bits} is no power of two from 1 to 64")
    if version < 3 and bits != 16:
        raise OptionError(f"compat=0.10 needs refcount_bits=16 (it is {bits})")
    if version < 3 and wanted.lazy_refcounts:
        raise OptionError("compat=0.10 knows no lazy_refcounts: switch it off")
    if version < 3 <= header.version:
        await downgrade.check(driver)
    if (wanted.data_file is not None or wanted.data_file_raw is not None) and not header.has_data_file:
        raise OptionError("data_file: the image keeps its data in itself, which can't be changed")
    if wanted.data_file_raw and not header.data_file_raw:
        raise OptionError("data_file_raw: it can only be switched off")
    if wanted.encrypt is not None and header.crypt_method != CryptMethod.LUKS:
        raise OptionError("encrypt: only images that are encrypted by LUKS have key slots")
    if wanted.backing_fmt and not (wanted.backing_file or header.backing_file):
        raise OptionError("backing_fmt needs backing_file")


async def _upgrade(driver: "Qcow2") -> None:
    header = driver.header
    header.version, header.header_length = 3, layout.HEADER_BYTES
    if header.cluster_size >= 8 * len(layout.FEATURE_NAMES) * layout.FEATURE_NAME_BYTES:
        header.feature_names = dict(layout.FEATURE_NAMES)
    await driver.snapshots.rewrite()  # version 3 demands more of each entry
    await driver.image.write_header()
    driver.map.header_changed()


async def _set_lazy(driver: "Qcow2", *, on: bool) -> None:
    header, image = driver.header, driver.image
    if header.version < 3 and on:
        raise OptionError("lazy_refcounts needs compat=1.1")
    if not on:
        image.lazy = False
        await image.commit_all()
        await image.barrier()
        header.incompatible &= ~Incompatible.DIRTY
    header.compatible = header.compatible & ~Compatible.LAZY_REFCOUNTS
    if on:
        header.compatible |= Compatible.LAZY_REFCOUNTS
    await image.write_features()


async def _change_data_file(driver: "Qcow2", wanted: Qcow2AmendOptions) -> None:
    header = driver.header
    if wanted.data_file is not None:
        header.data_file = wanted.data_file or None
    if wanted.data_file_raw is False:
        header.autoclear &= ~Autoclear.DATA_FILE_RAW
    await driver.image.write_header()


async def _amend_keys(driver: "Qcow2", changes: EncryptAmendOptions, *, force: bool) -> None:
    from pynbd.formats.qcow2.encryption import amend_keys

    assert driver.encryption is not None
    await amend_keys(driver.encryption, changes, driver.options.encrypt, driver.node.objects, force=force)


async def change_refcount_bits(driver: "Qcow2", bits: int, progress: Progress) -> None:
    """Count with another width: all counts are written anew, elsewhere, and then the header points there.

    Raises:
        OptionError: a count does not fit.
    """
    image, header = driver.image, driver.header
    if header.version < 3:
        raise OptionError("refcount_bits needs compat=1.1")
    await image.commit_all()
    old = image.refcounts
    order = bits.bit_length() - 1
    offset, table, blocks = await _room_for_counts(driver, order)
    entries = await _write_counts(driver, old, order, offset + table * image.cluster_size, blocks, progress)
    data = to_disk(entries).ljust(table * image.cluster_size, b"\0")
    await image.write_metadata(Kind.REFCOUNT_TABLE, offset, data)
    await image.barrier()
    gone = [(header.refcount_table_offset, header.refcount_table_clusters << image.cluster_bits)]
    gone += [(block, image.cluster_size) for block in old.table if block]
    await image.change_fields(
        48, 100, refcount_order=order, refcount_table_offset=offset, refcount_table_clusters=table
    )
    image.recount(entries, table)
    for place, length in gone:
        image.given_up.add(place, length, Cause.OTHER, structure=True)
    await image.commit_all()


async def _room_for_counts(driver: "Qcow2", order: int) -> tuple[int, int, int]:
    """Take clusters for a table and blocks of another width that count all clusters, themselves among them.

    Returns:
        (offset in bytes, clusters of the table, of the blocks); the blocks follow the table.

    Raises:
        OptionError: a count does not fit.
        BlockError: no size was found that is enough; nothing was taken.
    """
    image, header = driver.image, driver.header
    most, per_block = (1 << (1 << order)) - 1, image.cluster_size * 8 >> order
    used, spare = await _clusters_in_use(image.refcounts, most), SPARE_CLUSTERS
    for _ in range(MAX_TRIES):
        width, header.refcount_order = header.refcount_order, order
        table, blocks = counting_clusters(header, used + spare)
        header.refcount_order = width
        offset = await image.allocate_metadata(Kind.REFCOUNT_TABLE, (table + blocks) * image.cluster_size)
        await image.commit_all()
        await image.write_counts_now()
        end = await _clusters_in_use(image.refcounts, most)
        if end <= blocks * per_block:
            image.metadata.forget((offset >> image.cluster_bits) + table, blocks)
            image.metadata.note(Kind.REFCOUNT_BLOCK, offset + table * image.cluster_size, blocks * image.cluster_size)
            return offset, table, blocks
        await image.release_metadata(offset, (table + blocks) * image.cluster_size)
        # Those that count are counted as well: taking them took more blocks of the old width, and a longer table.
        used, spare = end, max(spare, 2 * (end - used - table - blocks))
    await image.commit_all()
    raise BlockError(f"{driver.image_name}: no room was found that is enough for counts of {1 << order} bits")


async def _clusters_in_use(counts: Refcounts, most: int) -> int:
    """One past the last cluster that is in use.

    Raises:
        OptionError: a count is more than `most`.
    """
    end = 0
    for index, entry in enumerate(counts.table):
        block = await counts.block(index) if entry else None
        if block is None:
            continue
        largest = max(block.words)
        if largest > most:
            raise OptionError(f"refcount_bits: a cluster has {largest} references, at most {most} would fit")
        if largest:
            last = max(at for at, count in enumerate(block.words) if count)
            end = index * counts.per_block + last + 1
    return end


async def _write_counts(
    driver: "Qcow2", old: Refcounts, order: int, offset: int, blocks: int, progress: Progress
) -> "array[int]":
    """Write all counts with another width; gives the new table's entries."""
    image = driver.image
    per_block = image.cluster_size * 8 >> order
    entries = array("Q")
    for number in range(blocks):
        progress(number, blocks)
        counts = array(TYPECODES[order], [0]) * per_block
        for index, first, last in old.by_block(number * per_block, per_block):
            block = await old.block(index)
            if block is not None:
                at = index * old.per_block + first - number * per_block
                counts[at : at + last - first] = array(TYPECODES[order], block.words[first:last])
        await image.write_metadata(Kind.REFCOUNT_BLOCK, offset + number * image.cluster_size, pack(counts, order))
        entries.append(offset + number * image.cluster_size)
    return entries

"""New images: how they are laid out, and how large they are going to be.

A new image is header, refcount table, refcount blocks, L1 table, encryption header, and, if it is preallocated, L2
tables and data, one behind the other. The header is written last: what was not finished is no image.
"""

import os
from array import array
from typing import Literal, NamedTuple

from pynbd.block.alignment import pieces, round_up
from pynbd.block.backend import BlockBackend
from pynbd.block.driver import CreationOptions, Preallocation
from pynbd.block.errors import OptionError
from pynbd.block.extents import Status
from pynbd.block.families import Measurement, PersistentBitmaps
from pynbd.block.node import Node
from pynbd.block.options import OnOff, Size
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.encrypt_options import EncryptCreationOptions
from pynbd.formats.qcow2.header import CryptoPointer, Header, build_header
from pynbd.formats.qcow2.layout import (
    COPIED,
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    Incompatible,
)
from pynbd.formats.qcow2.refcounts import TYPECODES, pack
from pynbd.formats.qcow2.tables import to_disk

COMPATS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
"""Versions of the format, by the names of the option."""

DEFAULT_CLUSTER_BYTES = 64 << 10
ZERO_BYTES = 1 << 20


class Qcow2CreationOptions(CreationOptions, frozen=True, kw_only=True):
    """Options of a new image.

    Args:
        compat: version of the format: 1.1, or 0.10 for very old programs.
        backing_file: what shows through where the image holds nothing, as it will stand in the image.
        backing_fmt: its format.
        data_file: the guest's bytes go to another file, of this name.
        data_file_raw: that file is to be a raw disk also without the image.
        cluster_size: bytes of a cluster, a power of two from 512 to 2M.
        lazy_refcounts: write reference counts late.
        refcount_bits: of a reference count, a power of two from 1 to 64.
        extended_l2: allocate and copy subclusters, 32 of each cluster.
        compression_type: of compressed clusters.
        encrypt: how the guest's bytes are encrypted.
        encryption: the same as `encrypt.format=aes`, for old scripts.
    """

    compat: Literal["0.10", "v2", "1.1", "v3"] = "1.1"
    backing_file: str | None = None
    backing_fmt: str | None = None
    data_file: str | None = None
    data_file_raw: OnOff = False
    cluster_size: Size = DEFAULT_CLUSTER_BYTES
    lazy_refcounts: OnOff = False
    refcount_bits: int = 16
    extended_l2: OnOff = False
    compression_type: Literal["zlib", "zstd"] = "zlib"
    encrypt: EncryptCreationOptions = EncryptCreationOptions()
    encryption: OnOff = False

    @property
    def preallocates(self) -> bool:
        """Whether tables for the whole disk are made. A raw data file is only right if all is allocated."""
        return self.preallocation is not Preallocation.OFF or self.data_file_raw


def check_options(options: Qcow2CreationOptions) -> None:
    """Whether the options can be had together.

    Raises:
        OptionError: no, and which ones.
    """
    size, bits = options.cluster_size, options.refcount_bits
    least, most = 1 << layout.MIN_CLUSTER_BITS, 1 << layout.MAX_CLUSTER_BITS
    if not least <= size <= most or size & (size - 1):
        raise OptionError(f"cluster_size: {size} is no power of two from {least} to {most}")
    if not 1 <= bits <= 64 or bits & (bits - 1):
        raise OptionError(f"refcount_bits: {bits} is no power of two from 1 to 64")
    version = COMPATS[options.compat]
    if options.extended_l2 and size < 1 << layout.MIN_EXTENDED_L2_CLUSTER_BITS:
        least = 1 << layout.MIN_EXTENDED_L2_CLUSTER_BITS
        raise OptionError(f"extended_l2 needs clusters of {least} bytes or more (cluster_size is {size})")
    wants = {
        "refcount_bits": bits != 16,
        "lazy_refcounts": options.lazy_refcounts,
        "extended_l2": options.extended_l2,
        "compression_type": options.compression_type != "zlib",
        "data_file": options.data_file is not None,
    }
    if version < 3 and any(wants.values()):
        name = next(name for name, wanted in wants.items() if wanted)
        raise OptionError(f"{name} needs compat=1.1 (compat is {options.compat})")
    if options.data_file_raw and options.data_file is None:
        raise OptionError("data_file_raw needs data_file")
    if options.data_file is not None and options.backing_file and options.data_file_raw:
        raise OptionError("a backing file and data_file_raw exclude each other")
    if options.encryption and options.encrypt.format not in (None, "aes"):
        raise OptionError(f"encryption=on means encrypt.format=aes, not {options.encrypt.format}")
    if crypt_method(options) == CryptMethod.NONE and options.encrypt != EncryptCreationOptions():
        raise OptionError("encrypt.format is missing: luks, or aes for very old programs")
    if options.backing_fmt and not options.backing_file:
        raise OptionError("backing_fmt needs backing_file")
    if options.backing_file and options.preallocation is not Preallocation.OFF and not options.extended_l2:
        raise OptionError("preallocation over a backing file needs extended_l2: it would hide what lies below")


def crypt_method(options: Qcow2CreationOptions) -> CryptMethod:
    """How a new image is encrypted."""
    kind = options.encrypt.format or ("aes" if options.encryption else "none")
    return CryptMethod[kind.upper()]


def header_of(options: Qcow2CreationOptions) -> Header:
    """The header of a new image, without the places of its tables."""
    version = COMPATS[options.compat]
    header = Header(
        version=version,
        cluster_bits=options.cluster_size.bit_length() - 1,
        size=round_up(options.size, 512),
        refcount_order=options.refcount_bits.bit_length() - 1,
        compression_type=CompressionType[options.compression_type.upper()],
        backing_file=options.backing_file or None,
        backing_format=options.backing_fmt or None,
        data_file=options.data_file,
        crypt_method=crypt_method(options),
    )
    if version < 3:
        header.header_length, header.feature_names = layout.V2_HEADER_BYTES, {}
    if options.lazy_refcounts:
        header.compatible |= Compatible.LAZY_REFCOUNTS
    if options.extended_l2:
        header.incompatible |= Incompatible.EXTENDED_L2
    if header.compression_type != CompressionType.ZLIB:
        header.incompatible |= Incompatible.COMPRESSION
    if options.data_file is not None:
        header.incompatible |= Incompatible.DATA_FILE
    if options.data_file_raw:
        header.autoclear |= Autoclear.DATA_FILE_RAW
    if header.cluster_size < 8 * len(layout.FEATURE_NAMES) * layout.FEATURE_NAME_BYTES:
        header.feature_names = {}
    return header


class Plan(NamedTuple):
    """How many clusters each part of a new image takes, in the order in which they lie in it."""

    refcount_table: int
    refcount_blocks: int
    l1: int
    crypto: int
    l2: int
    data: int

    @property
    def total(self) -> int:
        """Clusters of the whole image, with that of the header."""
        return 1 + sum(self)


def plan_of(header: Header, *, crypto_bytes: int = 0, preallocated: bool = False) -> Plan:
    """The parts of a new image.

    Raises:
        OptionError: the disk is too large for clusters of this size.
    """
    cluster = header.cluster_size
    l1_entries = header.l1_entries_for(header.size)
    if l1_entries * 8 > layout.MAX_L1_BYTES:
        most = layout.MAX_L1_BYTES // 8 * cluster * header.l2_entries
        raise OptionError(f"size: {header.size} bytes are too many for clusters of {cluster}, which allow for {most}")
    l2 = header.l1_entries_for(header.size) if preallocated else 0
    data = -(-header.size // cluster) if preallocated and not header.has_data_file else 0
    fixed = 1 + -(-l1_entries * 8 // cluster) + -(-crypto_bytes // cluster) + l2 + data
    table, blocks = counting_clusters(header, fixed)
    if table * cluster > max(layout.MAX_REFCOUNT_TABLE_BYTES, cluster):
        raise OptionError(f"size: a preallocated disk of {header.size} bytes takes too large a refcount table")
    return Plan(table, blocks, -(-l1_entries * 8 // cluster), -(-crypto_bytes // cluster), l2, data)


def counting_clusters(header: Header, clusters: int) -> tuple[int, int]:
    """(clusters of the refcount table, of refcount blocks) that count some clusters, and themselves."""
    per_block = header.cluster_size * 8 >> header.refcount_order
    table = blocks = 0
    while True:
        wanted = -(-(clusters + table + blocks) // per_block)
        wanted_table = -(-wanted * 8 // header.cluster_size)
        if (wanted_table, wanted) == (table, blocks):
            return table, blocks
        table, blocks = wanted_table, wanted


class Writing:
    """A new image on its way into a file."""

    def __init__(self, file: BlockBackend, header: Header, plan: Plan, name: str) -> None:
        self.file = file
        self.header = header
        self.plan = plan
        self.name = name
        cluster = header.cluster_size
        self.blocks_at = (1 + plan.refcount_table) * cluster
        self.crypto_at = self.blocks_at + (plan.refcount_blocks + plan.l1) * cluster
        self.l2_at = self.crypto_at + plan.crypto * cluster
        self.data_at = self.l2_at + plan.l2 * cluster
        header.refcount_table_offset, header.refcount_table_clusters = cluster, plan.refcount_table
        header.l1_size = header.l1_entries_for(header.size)
        header.l1_table_offset = self.blocks_at + plan.refcount_blocks * cluster if header.l1_size else 0

    async def prepare(self, preallocation: Preallocation) -> None:
        """Give the file its length, and let nothing in it look like an image."""
        cluster, plan = self.header.cluster_size, self.plan
        metadata_end = (plan.total - plan.data) * cluster
        await _resize(self.file, 0)
        await _resize(self.file, plan.total * cluster if preallocation is not Preallocation.OFF else metadata_end)
        # A device keeps what it held: nobody must take that for a header before the end.
        await self.file.write(0, memoryview(bytes(cluster)))

    async def run(self, preallocation: Preallocation, data_file: BlockBackend | None) -> None:
        """Write it all, the header last."""
        cluster, plan = self.header.cluster_size, self.plan
        await self._write_counts()
        await self._write_l1()
        await self._write_l2()
        if data_file is not None:
            from pynbd.formats.raw import erase_header

            await _resize(data_file, self.header.size)
            await erase_header(data_file)
            await fill(data_file, 0, self.header.size, preallocation)
        elif plan.data:
            await fill(self.file, self.data_at, plan.data * cluster, preallocation)
        await self.file.flush()
        await self.file.write(0, memoryview(build_header(self.header, self.name)))
        await self.file.flush()

    async def _write_counts(self) -> None:
        header, plan = self.header, self.plan
        per_block = header.cluster_size * 8 >> header.refcount_order
        left = plan.total
        offsets = array("Q")
        for number in range(plan.refcount_blocks):
            offset = self.blocks_at + number * header.cluster_size
            used = min(left, per_block)
            left -= used
            typecode = TYPECODES[header.refcount_order]
            counts = array(typecode, [1]) * used + array(typecode, [0]) * (per_block - used)
            await self.file.write(offset, memoryview(pack(counts, header.refcount_order)))
            offsets.append(offset)
        table = to_disk(offsets).ljust(plan.refcount_table * header.cluster_size, b"\0")
        await self.file.write(header.refcount_table_offset, memoryview(table))

    async def _write_l1(self) -> None:
        cluster, plan = self.header.cluster_size, self.plan
        if not plan.l1:
            return
        entries = array("Q", (self.l2_at + number * cluster | COPIED for number in range(plan.l2)))
        await self.file.write(self.header.l1_table_offset, memoryview(to_disk(entries).ljust(plan.l1 * cluster, b"\0")))

    async def _write_l2(self) -> None:
        header, plan = self.header, self.plan
        cluster, each = header.cluster_size, header.l2_entries
        clusters = -(-header.size // cluster)
        base = 0 if header.has_data_file else self.data_at
        for number in range(plan.l2):
            first, last = number * each, min((number + 1) * each, clusters)
            places = array("Q", range((base + first * cluster) | COPIED, (base + last * cluster) | COPIED, cluster))
            if header.extended_l2:
                # A place for each, and no subcluster in use: what shows through still does.
                words = array("Q", bytes(16 * len(places)))
                words[::2] = places
                places = words
            data = to_disk(places).ljust(cluster, b"\0")
            await self.file.write(self.l2_at + number * cluster, memoryview(data))


async def _resize(file: BlockBackend, size: int) -> None:
    """Give a file a length; a device must only be long enough.

    Raises:
        OSError: it can't be.
    """
    if file.size != size:
        await file.truncate(size, exact=False)


async def fill(file: BlockBackend, offset: int, length: int, preallocation: Preallocation) -> None:
    """Reserve the space of new data, which reads as zeroes."""
    if preallocation is Preallocation.FALLOC:
        for start, size in pieces(offset, length, 1 << 30):
            await file.write_zeroes(start, size)
    elif preallocation is Preallocation.FULL:
        zeroes = memoryview(bytes(ZERO_BYTES))
        for start, size in pieces(offset, length, ZERO_BYTES):
            await file.write(start, zeroes[:size])


async def create_image(
    file: BlockBackend, options: Qcow2CreationOptions, data_file: BlockBackend | None, name: str
) -> None:
    """Lay a new image out in a file; see `Driver.create_image`."""
    check_options(options)
    if options.data_file is not None and data_file is None:
        raise OptionError("data_file was given by name only: the file itself must be opened as well")
    header = header_of(options)
    passphrase, crypto_bytes = b"", crypto_header_bytes(options)
    if header.crypt_method != CryptMethod.NONE:
        passphrase = _passphrase(options, file)
    plan = plan_of(header, crypto_bytes=crypto_bytes, preallocated=options.preallocates)
    writing = Writing(file, header, plan, name)
    if crypto_bytes:
        header.crypto = CryptoPointer(writing.crypto_at, crypto_bytes)
    build_header(header, name)  # what does not fit is told before anything is written
    await writing.prepare(options.preallocation)
    if crypto_bytes:
        await _write_crypto(file, options, passphrase, writing.crypto_at, name)
    await writing.run(options.preallocation, data_file)


def crypto_header_bytes(options: Qcow2CreationOptions) -> int:
    """Bytes that the encryption header of a new image takes."""
    if crypt_method(options) != CryptMethod.LUKS:
        return 0
    from pynbd.crypto.luks import header_bytes

    return header_bytes(options.encrypt)


def _passphrase(options: Qcow2CreationOptions, file: BlockBackend) -> bytes:
    from pynbd.formats.qcow2.encryption import passphrase_of

    return passphrase_of(options.encrypt, file.node.objects)


async def _write_crypto(
    file: BlockBackend, options: Qcow2CreationOptions, passphrase: bytes, offset: int, name: str
) -> None:
    from pynbd.crypto.luks import Luks
    from pynbd.formats.qcow2.encryption import HeaderInClusters

    await Luks.create(HeaderInClusters(file, offset), options.encrypt, passphrase, name)


# --- measuring ------------------------------------------------------------------------------------------------


async def measure(options: Qcow2CreationOptions, source: BlockBackend | None) -> Measurement:
    """How large a new image would be; see `Measurable.measure`. As in QEMU, with tables for the whole disk."""
    check_options(options)
    size = options.size if source is None else source.size
    header = header_of(options)
    cluster = header.cluster_size
    header.size = virtual = round_up(size, cluster)
    plan_of(header)
    entry_bytes = 8 * header.l2_entry_words
    l2_entries = round_up(virtual // cluster, header.l2_entries)
    l2_bytes = l2_entries * entry_bytes
    l1_bytes = round_up(l2_bytes // cluster * 8, cluster)
    metadata = cluster + l2_bytes + l1_bytes
    metadata += round_up(crypto_header_bytes(options), cluster)
    metadata += sum(counting_clusters(header, (metadata + virtual) // cluster)) * cluster
    needed = virtual if options.preallocation in (Preallocation.FALLOC, Preallocation.FULL) else 0
    if source is not None and not needed:
        needed = virtual if options.backing_file else await data_bytes(source, cluster)
    bitmaps = None
    if source is not None and header.version >= 3:
        bitmaps = bitmap_bytes(source.node, cluster)
    return Measurement(required=metadata + needed, fully_allocated=metadata + virtual, bitmaps=bitmaps)


def bitmap_bytes(source: Node, cluster: int) -> int | None:
    """What the persistent bitmaps of a disk would take in a new image: data, tables and the directory.

    None if its format keeps none. A snapshot has those of its image, as for QEMU.
    """
    if source.driver.name == "qcow2-snapshot":
        source = source.children["file"].node
    if not isinstance(source.driver, PersistentBitmaps):
        return None
    total = directory = 0
    for bitmap in source.bitmaps.values():
        if not bitmap.persistent or bitmap.inconsistent:
            continue
        bits = -(-source.size // bitmap.granularity)
        clusters = -(-bits // (8 * cluster))
        total += clusters * cluster + round_up(clusters * 8, cluster)
        directory += round_up(layout.BITMAP_BYTES + len(os.fsencode(bitmap.name)), 8)
    return total + round_up(directory, cluster)


async def data_bytes(source: BlockBackend, cluster: int) -> int:
    """Bytes of all clusters in which a disk holds data."""
    found, offset, counted = 0, 0, 0
    while offset < source.size:
        for extent in await source.block_status(offset, source.size - offset):
            end = offset + extent.length
            if extent.status & Status.DATA and not extent.status & Status.ZERO:
                first, last = max(offset // cluster * cluster, counted), round_up(end, cluster)
                found += max(last - first, 0)
                counted = max(counted, last)
            offset = end
    return found

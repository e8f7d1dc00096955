"""The header of a qcow2 image: read with every doubt, kept as a typed struct, and written again.

What is not understood is kept: unknown extensions, unknown compatible features and additional fields go back as they
came. Unknown incompatible features are refused by the name that the image's own table gives them.
"""

import os
from collections.abc import Iterable, Iterator

import construct
import msgspec

from pynbd.block.alignment import round_up
from pynbd.block.errors import ImageError
from pynbd.block.options import MAX_SIZE_BYTES
from pynbd.formats.qcow2 import layout
from pynbd.formats.qcow2.layout import (
    Autoclear,
    Compatible,
    CompressionType,
    CryptMethod,
    ExtensionType,
    FeatureKind,
    Incompatible,
)

PEEK_BYTES = layout.HEADER_BYTES
"""As much of an image as `peek_cluster_size` needs."""


class BitmapsPointer(msgspec.Struct, frozen=True):
    """Where the bitmap directory lies (the bitmaps extension)."""

    nb_bitmaps: int
    directory_size: int
    directory_offset: int


class CryptoPointer(msgspec.Struct, frozen=True):
    """Where the encryption header lies (the full disk encryption header pointer)."""

    offset: int
    length: int


class Header(msgspec.Struct, kw_only=True):
    """What the header says. Offsets and sizes are in bytes.

    Args:
        size: the length of the disk.
        l1_size: entries of the active L1 table.
        backing_file: the name of the backing file as it stands there, None if there is none.
        backing_format: its format, None if the image does not say.
        data_file: the name of the external data file, None if the image does not say.
        bitmaps: where bitmaps are; only to be believed if `Autoclear.BITMAPS` is set.
        feature_names: (kind, bit) → name, the image's own.
        header_length: of the part before the extensions.
        additional: the additional fields behind `compression_type`, unknown and kept.
        unknown_extensions: (type, data) of extensions that are not known, kept.
    """

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    crypt_method: CryptMethod = CryptMethod.NONE
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: Incompatible = Incompatible(0)
    compatible: Compatible = Compatible(0)
    autoclear: Autoclear = Autoclear(0)
    refcount_order: int = layout.V2_REFCOUNT_ORDER
    header_length: int = layout.HEADER_BYTES
    compression_type: CompressionType = CompressionType.ZLIB
    additional: bytes = b""
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    bitmaps: BitmapsPointer | None = None
    crypto: CryptoPointer | None = None
    feature_names: dict[tuple[int, int], str] = msgspec.field(default_factory=lambda: dict(layout.FEATURE_NAMES))
    unknown_extensions: list[tuple[int, bytes]] = []

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Bits of a reference count."""
        return 1 << self.refcount_order

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have 128 bits and clusters have subclusters."""
        return Incompatible.EXTENDED_L2 in self.incompatible

    @property
    def has_data_file(self) -> bool:
        """Whether the guest's bytes lie in another file."""
        return Incompatible.DATA_FILE in self.incompatible

    @property
    def data_file_raw(self) -> bool:
        """Whether that file is to be a raw disk without the image."""
        return self.has_data_file and Autoclear.DATA_FILE_RAW in self.autoclear

    @property
    def lazy_refcounts(self) -> bool:
        """Whether refcounts may be written late, with the image marked dirty meanwhile."""
        return Compatible.LAZY_REFCOUNTS in self.compatible

    @property
    def l2_entry_words(self) -> int:
        """64-bit words of an L2 entry."""
        return 2 if self.extended_l2 else 1

    @property
    def l2_entries(self) -> int:
        """Entries of an L2 table."""
        return self.cluster_size // (8 * self.l2_entry_words)

    @property
    def unknown_autoclear(self) -> int:
        """Bits that must be cleared before the image is written to."""
        return int(self.autoclear) & ~layout.KNOWN_AUTOCLEAR

    def l1_entries_for(self, size: int) -> int:
        """Entries of an L1 table for a disk of `size` bytes."""
        return -(-size // (self.cluster_size * self.l2_entries))


# --- reading ---------------------------------------------------------------------------------------------------------


def peek_cluster_size(head: bytes, image: str) -> int:
    """Bytes of a cluster, which is how much `parse_header` must be given.

    Args:
        head: the first `PEEK_BYTES` of the image.
        image: its name for messages.

    Raises:
        ImageError: it is no qcow2 image that could be opened.
    """
    return 1 << int(_fixed_part(head, image).cluster_bits)


def _fixed_part(data: bytes, image: str) -> construct.Container:
    """The fields that both versions have, with those that all else depends on checked."""
    if data[:4] != layout.MAGIC:
        raise ImageError(image, f"no qcow2 image: it begins with {data[:4]!r}, expected {layout.MAGIC!r}", 0)
    if len(data) < layout.V2_HEADER_BYTES:
        raise ImageError(image, f"the header ends after {len(data)} bytes, it takes {layout.V2_HEADER_BYTES}")
    fields = layout.parsed(layout.HEADER_V2, data)
    if fields.version not in (2, 3):
        raise ImageError(image, f"qcow2 version {fields.version}; 2 and 3 can be opened", 4)
    if not layout.MIN_CLUSTER_BITS <= fields.cluster_bits <= layout.MAX_CLUSTER_BITS:
        wanted = f"{layout.MIN_CLUSTER_BITS} to {layout.MAX_CLUSTER_BITS}"
        raise ImageError(image, f"cluster_bits is {fields.cluster_bits}, expected {wanted}", 20)
    return fields


def parse_header(data: bytes, image: str, *, for_check: bool = False) -> Header:
    """Read a header.

    Args:
        data: the first cluster of the image, or all of it if it is shorter.
        image: its name for messages.
        for_check: a wrong place of the refcount table is no error; then the image has none, of 0 clusters.

    Raises:
        ImageError: something in it is not as the format demands, or asks for more than the limits allow.
    """
    fields = _fixed_part(data, image)
    header = Header(
        version=fields.version,
        cluster_bits=fields.cluster_bits,
        size=fields.size,
        l1_size=fields.l1_size,
        l1_table_offset=fields.l1_table_offset,
        refcount_table_offset=fields.refcount_table_offset,
        refcount_table_clusters=fields.refcount_table_clusters,
        nb_snapshots=fields.nb_snapshots,
        snapshots_offset=fields.snapshots_offset,
        header_length=layout.V2_HEADER_BYTES,
        feature_names={},
    )
    if header.version >= 3:
        _parse_version_3(header, data, image)
    # The backing file's name is where extensions end at the latest.
    end = len(data)
    if fields.backing_file_offset:
        _check_backing_name(header, fields, data, image)
        end = fields.backing_file_offset
    for kind, content, offset in _extensions(data, header.header_length, end, image):
        _take_extension(header, kind, content, offset, image)
    _check_features(header, image)
    if fields.crypt_method not in list(CryptMethod):
        raise ImageError(image, f"encryption method {fields.crypt_method} is unknown (0 none, 1 AES, 2 LUKS)", 32)
    header.crypt_method = CryptMethod(fields.crypt_method)
    if fields.backing_file_offset:
        name = data[fields.backing_file_offset : fields.backing_file_offset + fields.backing_file_size]
        header.backing_file = os.fsdecode(name)
    if for_check and _is_table_wrong(header):
        header.refcount_table_offset = header.refcount_table_clusters = 0
    _check_tables(header, image, refcounts=not for_check)
    return header


def _parse_version_3(header: Header, data: bytes, image: str) -> None:
    if len(data) < layout.V3_HEADER_BYTES:
        raise ImageError(image, f"the header ends after {len(data)} bytes, it takes {layout.V3_HEADER_BYTES}")
    fields = layout.parsed(layout.HEADER_V3, data, layout.V2_HEADER_BYTES)
    length = fields.header_length
    most = min(layout.MAX_HEADER_BYTES, header.cluster_size, len(data))
    if not layout.V3_HEADER_BYTES <= length <= most or length % 8:
        wanted = f"a multiple of 8 from {layout.V3_HEADER_BYTES} to {most}"
        raise ImageError(image, f"header_length is {length}, expected {wanted}", 100)
    if fields.refcount_order > layout.MAX_REFCOUNT_ORDER:
        problem = f"refcount_order is {fields.refcount_order}, expected 0 to {layout.MAX_REFCOUNT_ORDER}"
        raise ImageError(image, problem, 96)
    header.header_length = length
    header.incompatible = Incompatible(fields.incompatible_features)
    header.compatible = Compatible(fields.compatible_features)
    header.autoclear = Autoclear(fields.autoclear_features)
    header.refcount_order = fields.refcount_order
    compression = data[layout.V3_HEADER_BYTES] if length > layout.V3_HEADER_BYTES else 0
    header.additional = data[layout.HEADER_BYTES : length]
    if bool(compression) != (Incompatible.COMPRESSION in header.incompatible):
        problem = f"compression_type is {compression}, which does not go with the incompatible feature bit 3"
        raise ImageError(image, problem, layout.V3_HEADER_BYTES)
    if compression not in list(CompressionType):
        raise ImageError(image, f"compression type {compression} is unknown (0 zlib, 1 zstd)", layout.V3_HEADER_BYTES)
    header.compression_type = CompressionType(compression)


def _check_backing_name(header: Header, fields: construct.Container, data: bytes, image: str) -> None:
    offset, length = fields.backing_file_offset, fields.backing_file_size
    if length > layout.MAX_BACKING_FILE_BYTES:
        problem = f"the backing file's name has {length} bytes, at most {layout.MAX_BACKING_FILE_BYTES} are allowed"
        raise ImageError(image, problem, 16)
    if not header.header_length <= offset <= len(data) - length:
        where = f"{offset} to {offset + length}"
        problem = f"the backing file's name lies at {where}, expected between the header and {len(data)}"
        raise ImageError(image, problem, 8)


def _extensions(data: bytes, offset: int, end: int, image: str) -> Iterator[tuple[int, bytes, int]]:
    """(type, data, offset of the data) of all extensions up to the end mark."""
    size = layout.EXTENSION.sizeof()
    for _ in range(layout.MAX_EXTENSIONS):
        if offset > end - size:
            return
        extension = layout.parsed(layout.EXTENSION, data, offset)
        if extension.type == ExtensionType.END:
            return
        start = offset + size
        if extension.length > end - start:
            problem = f"header extension {extension.type:#010x} has {extension.length} bytes, {end - start} are there"
            raise ImageError(image, problem, offset)
        yield extension.type, data[start : start + extension.length], start
        offset = start + round_up(extension.length, 8)
    raise ImageError(image, f"more than {layout.MAX_EXTENSIONS} header extensions", offset)


def _take_extension(header: Header, kind: int, content: bytes, offset: int, image: str) -> None:
    if kind == ExtensionType.BACKING_FORMAT:
        header.backing_format = content.decode(errors="replace")
    elif kind == ExtensionType.DATA_FILE:
        header.data_file = os.fsdecode(content)
    elif kind == ExtensionType.FEATURE_NAMES:
        header.feature_names = dict(_feature_names(content))
    elif kind == ExtensionType.BITMAPS:
        header.bitmaps = _bitmaps_pointer(header, content, offset, image)
    elif kind == ExtensionType.CRYPTO_HEADER:
        header.crypto = _crypto_pointer(header, content, offset, image)
    else:
        header.unknown_extensions.append((kind, content))


def _feature_names(content: bytes) -> Iterator[tuple[tuple[int, int], str]]:
    for start in range(0, len(content) - layout.FEATURE_NAME_BYTES + 1, layout.FEATURE_NAME_BYTES):
        entry = layout.parsed(layout.FEATURE_NAME, content, start)
        yield (entry.kind, entry.bit), entry.name.partition(b"\0")[0].decode(errors="replace")


def _bitmaps_pointer(header: Header, content: bytes, offset: int, image: str) -> BitmapsPointer:
    if len(content) != layout.BITMAPS_EXTENSION.sizeof():
        problem = f"the bitmaps extension has {len(content)} bytes, expected {layout.BITMAPS_EXTENSION.sizeof()}"
        raise ImageError(image, problem, offset)
    try:
        fields = layout.parsed(layout.BITMAPS_EXTENSION, content)
    except construct.ConstError:
        raise ImageError(image, "the reserved field of the bitmaps extension is not zero", offset + 4) from None
    pointer = BitmapsPointer(fields.nb_bitmaps, fields.bitmap_directory_size, fields.bitmap_directory_offset)
    if not 1 <= pointer.nb_bitmaps <= layout.MAX_BITMAPS:
        problem = f"the bitmaps extension tells of {pointer.nb_bitmaps} bitmaps, expected 1 to {layout.MAX_BITMAPS}"
        raise ImageError(image, problem, offset)
    if pointer.directory_size > layout.MAX_BITMAP_DIRECTORY_BYTES:
        problem = f"bitmap_directory_size is {pointer.directory_size}, at most {layout.MAX_BITMAP_DIRECTORY_BYTES}"
        raise ImageError(image, problem, offset + 8)
    if pointer.directory_offset % header.cluster_size:
        problem = f"bitmap_directory_offset is {pointer.directory_offset}, expected a multiple of {header.cluster_size}"
        raise ImageError(image, problem, offset + 16)
    return pointer


def _crypto_pointer(header: Header, content: bytes, offset: int, image: str) -> CryptoPointer:
    if len(content) != layout.CRYPTO_HEADER_POINTER.sizeof():
        wanted = layout.CRYPTO_HEADER_POINTER.sizeof()
        problem = f"the encryption header pointer has {len(content)} bytes, expected {wanted}"
        raise ImageError(image, problem, offset)
    fields = layout.parsed(layout.CRYPTO_HEADER_POINTER, content)
    if fields.offset % header.cluster_size:
        problem = f"the encryption header lies at {fields.offset}, expected a multiple of {header.cluster_size}"
        raise ImageError(image, problem, offset)
    return CryptoPointer(fields.offset, fields.length)


def _check_features(header: Header, image: str) -> None:
    unknown = int(header.incompatible) & ~layout.KNOWN_INCOMPATIBLE
    if unknown:
        names = ", ".join(unknown_names(header, FeatureKind.INCOMPATIBLE, unknown))
        raise ImageError(image, f"it uses features that are not supported: {names}", layout.V2_HEADER_BYTES)
    if header.extended_l2 and header.cluster_bits < layout.MIN_EXTENDED_L2_CLUSTER_BITS:
        least = layout.MIN_EXTENDED_L2_CLUSTER_BITS
        raise ImageError(image, f"extended L2 entries with cluster_bits {header.cluster_bits}, expected {least}", 20)
    if header.data_file_raw and header.backing_file is not None:
        raise ImageError(image, "a raw external data file and a backing file exclude each other")


def unknown_names(header: Header, kind: FeatureKind, bits: int) -> Iterable[str]:
    """What features are called: by the image's own table, or by their number."""
    for bit in range(64):
        if bits >> bit & 1:
            yield header.feature_names.get((kind, bit)) or f"unknown {kind.name.lower()} feature, bit {bit}"


def _is_table_wrong(header: Header) -> bool:
    """Whether there can't be a refcount table where the header says, or it would be too large."""
    offset, most = header.refcount_table_offset, max(layout.MAX_REFCOUNT_TABLE_BYTES // header.cluster_size, 1)
    return (
        offset % header.cluster_size != 0
        or not 0 < offset < layout.MAX_HOST_OFFSET
        or not 0 < header.refcount_table_clusters <= most
    )


def _check_tables(header: Header, image: str, *, refcounts: bool) -> None:
    """Sizes and offsets of what the header points to: bounded, aligned."""
    cluster = header.cluster_size
    if header.size > MAX_SIZE_BYTES:
        raise ImageError(image, f"the disk's size is {header.size}, at most {MAX_SIZE_BYTES} bytes are allowed", 24)
    if header.l1_size > layout.MAX_L1_BYTES // 8:
        raise ImageError(image, f"l1_size is {header.l1_size}, at most {layout.MAX_L1_BYTES // 8} are allowed", 36)
    needed = header.l1_entries_for(header.size)
    if header.l1_size < needed:
        raise ImageError(image, f"l1_size is {header.l1_size}, a disk of {header.size} bytes takes {needed}", 36)
    if refcounts and not header.refcount_table_clusters:
        raise ImageError(image, "it has no refcount table", 56)
    if header.refcount_table_clusters > max(layout.MAX_REFCOUNT_TABLE_BYTES // cluster, 1):
        most = max(layout.MAX_REFCOUNT_TABLE_BYTES // cluster, 1)
        raise ImageError(image, f"the refcount table has {header.refcount_table_clusters} clusters, at most {most}", 56)
    if header.nb_snapshots > layout.MAX_SNAPSHOTS:
        raise ImageError(image, f"{header.nb_snapshots} snapshots, at most {layout.MAX_SNAPSHOTS} are allowed", 60)
    for name, offset, at, used in (
        ("l1_table_offset", header.l1_table_offset, 40, header.l1_size),
        ("refcount_table_offset", header.refcount_table_offset, 48, refcounts),
        ("snapshots_offset", header.snapshots_offset, 64, header.nb_snapshots),
    ):
        # Where the header lies no table can be, whatever the image says.
        if used and (offset % cluster or not 0 < offset < layout.MAX_HOST_OFFSET):
            raise ImageError(image, f"{name} is {offset}, expected a multiple of {cluster}, and not 0", at)


# --- writing ---------------------------------------------------------------------------------------------------------


def build_fixed(header: Header, *, backing_file_offset: int = 0) -> bytes:
    """The part of the header before the extensions; it lies in the first 512 bytes, which disks write as one.

    Args:
        header: what to write.
        backing_file_offset: where the backing file's name lies, if there is one.
    """
    name = b"" if header.backing_file is None else os.fsencode(header.backing_file)
    fixed: bytes = layout.HEADER_V2.build(
        {
            "version": header.version,
            "backing_file_offset": backing_file_offset,
            "backing_file_size": len(name),
            "cluster_bits": header.cluster_bits,
            "size": header.size,
            "crypt_method": header.crypt_method,
            "l1_size": header.l1_size,
            "l1_table_offset": header.l1_table_offset,
            "refcount_table_offset": header.refcount_table_offset,
            "refcount_table_clusters": header.refcount_table_clusters,
            "nb_snapshots": header.nb_snapshots,
            "snapshots_offset": header.snapshots_offset,
        }
    )
    if header.version < 3:
        return fixed
    fixed += layout.HEADER_V3.build(
        {
            "incompatible_features": int(header.incompatible),
            "compatible_features": int(header.compatible),
            "autoclear_features": int(header.autoclear),
            "refcount_order": header.refcount_order,
            "header_length": header.header_length,
        }
    )
    if header.header_length > layout.V3_HEADER_BYTES:
        fixed += layout.ADDITIONAL_FIELDS.build({"compression_type": header.compression_type}) + header.additional
    return fixed[: header.header_length]


def build_header(header: Header, image: str) -> bytes:
    """The whole header: fields, extensions and the backing file's name.

    Args:
        header: what to write; a header of version 3 gets the length of one with all known additional fields.
        image: its name for messages.

    Returns:
        at most a cluster; what lies behind it in the first cluster is to be zero.

    Raises:
        ImageError: it does not fit into a cluster, or the backing file's name is too long.
    """
    if header.version >= 3:
        header.header_length = max(header.header_length, layout.HEADER_BYTES)
    else:
        header.header_length = layout.V2_HEADER_BYTES
    name = b"" if header.backing_file is None else os.fsencode(header.backing_file)
    if len(name) > layout.MAX_BACKING_FILE_BYTES:
        problem = f"the backing file's name has {len(name)} bytes, at most {layout.MAX_BACKING_FILE_BYTES} are allowed"
        raise ImageError(image, problem)
    room = header.cluster_size - header.header_length - len(name)
    extensions = _build_extensions(header, feature_names=True)
    if len(extensions) > room:
        # Names of features are for people who meet them with old programs; the smallest clusters have no room for them.
        extensions = _build_extensions(header, feature_names=False)
    if len(extensions) > room:
        length = header.header_length + len(extensions) + len(name)
        problem = f"its header would take {length} bytes, a cluster has {header.cluster_size}"
        raise ImageError(image, problem)
    offset = header.header_length + len(extensions) if header.backing_file is not None else 0
    return build_fixed(header, backing_file_offset=offset) + extensions + name


def backing_file_offset(header: Header, data: bytes) -> int:
    """Where the backing file's name lies in a header that was read or built, 0 if there is none."""
    offset: int = layout.parsed(layout.HEADER_V2, data).backing_file_offset
    return offset if header.backing_file is not None else 0


def _build_extensions(header: Header, *, feature_names: bool) -> bytes:
    found: list[tuple[int, bytes]] = []
    if header.backing_format is not None:
        found.append((ExtensionType.BACKING_FORMAT, header.backing_format.encode()))
    if header.data_file is not None and header.has_data_file:
        found.append((ExtensionType.DATA_FILE, os.fsencode(header.data_file)))
    if header.crypto is not None:
        pointer = {"offset": header.crypto.offset, "length": header.crypto.length}
        found.append((ExtensionType.CRYPTO_HEADER, layout.CRYPTO_HEADER_POINTER.build(pointer)))
    if feature_names and header.version >= 3 and header.feature_names:
        entries = [
            layout.FEATURE_NAME.build({"kind": kind, "bit": bit, "name": name.encode()[:46].ljust(46, b"\0")})
            for (kind, bit), name in header.feature_names.items()
        ]
        found.append((ExtensionType.FEATURE_NAMES, b"".join(entries)))
    if header.bitmaps is not None and Autoclear.BITMAPS in header.autoclear:
        fields = {
            "nb_bitmaps": header.bitmaps.nb_bitmaps,
            "bitmap_directory_size": header.bitmaps.directory_size,
            "bitmap_directory_offset": header.bitmaps.directory_offset,
        }
        found.append((ExtensionType.BITMAPS, layout.BITMAPS_EXTENSION.build(fields)))
    found += header.unknown_extensions
    found.append((ExtensionType.END, b""))
    return b"".join(
        layout.EXTENSION.build({"type": kind, "length": len(content)}) + content.ljust(round_up(len(content), 8), b"\0")
        for kind, content in found
    )

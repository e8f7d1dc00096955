"""Every structure of a qcow2 image and every number in it, declared once; behaviour lives in the other modules.

Names are those of the specification, QEMU's docs/interop/qcow2.txt, whose section is told at each. All numbers are
big endian. L1, L2, refcount and bitmap tables are not declared here: they are arrays of 64-bit words (`tables.py`).
"""

from enum import IntEnum, IntFlag
from typing import Any

from construct import Bytes, Const, Int8ub, Int16ub, Int32ub, Int64ub, Padding, Struct

# --- header (section "Header") -----------------------------------------------------------------------------------

MAGIC = b"QFI\xfb"

HEADER_V2 = Struct(
    "magic" / Const(MAGIC),
    "version" / Int32ub,
    "backing_file_offset" / Int64ub,
    "backing_file_size" / Int32ub,
    "cluster_bits" / Int32ub,
    "size" / Int64ub,
    "crypt_method" / Int32ub,
    "l1_size" / Int32ub,
    "l1_table_offset" / Int64ub,
    "refcount_table_offset" / Int64ub,
    "refcount_table_clusters" / Int32ub,
    "nb_snapshots" / Int32ub,
    "snapshots_offset" / Int64ub,
)

HEADER_V3 = Struct(
    "incompatible_features" / Int64ub,
    "compatible_features" / Int64ub,
    "autoclear_features" / Int64ub,
    "refcount_order" / Int32ub,
    "header_length" / Int32ub,
)
"""What follows `HEADER_V2` in version 3."""

ADDITIONAL_FIELDS = Struct("compression_type" / Int8ub, Padding(7))
"""What may follow `HEADER_V3` (section "Additional fields"); absent means zero."""

V2_HEADER_BYTES = 72
V3_HEADER_BYTES = 104
HEADER_BYTES = 112
"""Length of a header with all additional fields that are known, as new images have it."""

MAX_HEADER_BYTES = 4096
"""The longest header that is believed: additional fields are few, and the length is read from the image."""


class CryptMethod(IntEnum):
    """How the guest's bytes are encrypted."""

    NONE = 0
    AES = 1
    LUKS = 2


class CompressionType(IntEnum):
    """How compressed clusters are compressed; names are those of the option."""

    ZLIB = 0
    ZSTD = 1


class Incompatible(IntFlag):
    """Features that whoever opens the image must know."""

    DIRTY = 1 << 0
    CORRUPT = 1 << 1
    DATA_FILE = 1 << 2
    COMPRESSION = 1 << 3
    EXTENDED_L2 = 1 << 4


class Compatible(IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1 << 0


class Autoclear(IntFlag):
    """Features whose bit is cleared by whoever writes to the image without knowing them."""

    BITMAPS = 1 << 0
    DATA_FILE_RAW = 1 << 1


KNOWN_INCOMPATIBLE = sum(Incompatible)
KNOWN_AUTOCLEAR = sum(Autoclear)

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21
MIN_EXTENDED_L2_CLUSTER_BITS = 14
MAX_REFCOUNT_ORDER = 6
V2_REFCOUNT_ORDER = 4
MAX_BACKING_FILE_BYTES = 1023

# QEMU's own limits for what is kept in memory whole, so that images of one open in the other.
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE_BYTES = MAX_SNAPSHOTS * 1024
MAX_SNAPSHOT_EXTRA_BYTES = 1024

# --- header extensions -------------------------------------------------------------------------------------------

EXTENSION = Struct("type" / Int32ub, "length" / Int32ub)
"""What each extension begins with; data follow, padded to a multiple of 8 (section "Header extensions")."""

MAX_EXTENSIONS = 256
"""Extensions of one header, known and unknown; there are five known ones."""


class ExtensionType(IntEnum):
    """The extensions that are known."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    CRYPTO_HEADER = 0x0537BE77
    DATA_FILE = 0x44415441


FEATURE_NAME = Struct("kind" / Int8ub, "bit" / Int8ub, "name" / Bytes(46))
"""One entry of the section "Feature name table"; the name is padded with zeroes."""

FEATURE_NAME_BYTES = 48


class FeatureKind(IntEnum):
    """Which of the three sets of features an entry of the name table is about."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


FEATURE_NAMES: dict[tuple[int, int], str] = {
    (FeatureKind.INCOMPATIBLE, 0): "dirty bit",
    (FeatureKind.INCOMPATIBLE, 1): "corrupt bit",
    (FeatureKind.INCOMPATIBLE, 2): "external data file",
    (FeatureKind.INCOMPATIBLE, 3): "compression type",
    (FeatureKind.INCOMPATIBLE, 4): "extended L2 entries",
    (FeatureKind.COMPATIBLE, 0): "lazy refcounts",
    (FeatureKind.AUTOCLEAR, 0): "bitmaps",
    (FeatureKind.AUTOCLEAR, 1): "raw external data",
}
"""What is written into the name table of new images: (kind, bit) → name."""

BITMAPS_EXTENSION = Struct(
    "nb_bitmaps" / Int32ub,
    "reserved" / Const(0, Int32ub),
    "bitmap_directory_size" / Int64ub,
    "bitmap_directory_offset" / Int64ub,
)

CRYPTO_HEADER_POINTER = Struct("offset" / Int64ub, "length" / Int64ub)
"""Section "Full disk encryption header pointer"."""

# --- refcounts (section "Host cluster management") -----------------------------------------------------------------

REFCOUNT_BLOCK_MASK = 0xFFFF_FFFF_FFFF_FE00
"""The offset of the refcount block in an entry of the refcount table."""

# --- cluster mapping (sections "Cluster mapping" and "Extended L2 Entries") ---------------------------------------

COPIED = 1 << 63
"""Of an L1 or L2 entry: the refcount of what it points to is exactly one, so it may be written in place."""

COMPRESSED = 1 << 62
"""Of an L2 entry: a compressed cluster descriptor."""

ZERO = 1
"""Of an L2 entry that is not extended (version 3): the cluster reads as zeroes."""

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
"""The host offset in an L1 or L2 entry."""

L1_RESERVED = 0x7F00_0000_0000_01FF
L2_RESERVED = 0x3F00_0000_0000_01FE

SUBCLUSTERS = 32
"""Subclusters of a cluster with extended L2 entries."""

SUBCLUSTERS_ALL_ALLOCATED = 0xFFFF_FFFF
SUBCLUSTERS_ALL_ZERO = 0xFFFF_FFFF << 32

MAX_HOST_OFFSET = 1 << 56
"""Where host clusters end that L1 and L2 entries can point to."""

COMPRESSED_SECTOR = 512
"""The unit in which the length of compressed data is told."""

# --- snapshots (section "Snapshots") ---------------------------------------------------------------------------------

SNAPSHOT = Struct(
    "l1_table_offset" / Int64ub,
    "l1_size" / Int32ub,
    "id_size" / Int16ub,
    "name_size" / Int16ub,
    "date_s" / Int32ub,
    "date_ns" / Int32ub,
    "vm_clock_ns" / Int64ub,
    "vm_state_size" / Int32ub,
    "extra_data_size" / Int32ub,
)
"""What an entry of the snapshot table begins with; extra data, id and name follow, padded to a multiple of 8."""

SNAPSHOT_BYTES = 40

SNAPSHOT_EXTRA_SIZES = Struct("vm_state_size_large" / Int64ub, "disk_size" / Int64ub)
"""The first extra data of a snapshot, compulsory in version 3."""

SNAPSHOT_EXTRA_ICOUNT = Struct("icount" / Int64ub)
"""The extra data behind them: instructions of the guest; all ones if it did not count them."""

# --- bitmaps (section "Bitmaps") -------------------------------------------------------------------------------------

BITMAP = Struct(
    "bitmap_table_offset" / Int64ub,
    "bitmap_table_size" / Int32ub,
    "flags" / Int32ub,
    "type" / Int8ub,
    "granularity_bits" / Int8ub,
    "name_size" / Int16ub,
    "extra_data_size" / Int32ub,
)
"""What an entry of the bitmap directory begins with; extra data and name follow, padded to a multiple of 8."""

BITMAP_BYTES = 24


class BitmapFlag(IntFlag):
    """Flags of an entry of the bitmap directory; the names are the specification's."""

    IN_USE = 1 << 0
    AUTO = 1 << 1
    EXTRA_DATA_COMPATIBLE = 1 << 2


BITMAP_TYPE_DIRTY_TRACKING = 1
BITMAP_ALL_ONES = 1
"""Of an entry of a bitmap table that has no offset: its part of the bitmap is all ones."""

BITMAP_TABLE_RESERVED = 0xFF00_0000_0000_01FE
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MAX_BITMAP_NAME_BYTES = 1023
MAX_BITMAPS = 65535
MAX_BITMAP_DIRECTORY_BYTES = 64 << 20
MAX_BITMAP_TABLE_ENTRIES = 0x800_0000
MAX_BITMAP_BYTES = 0x2000_0000
"""The largest bitmap, in bytes of bits; as in QEMU."""


def parsed(structure: Any, data: bytes | memoryview, offset: int = 0) -> Any:
    """The container of a structure at an offset of some bytes (construct is untyped).

    Raises:
        construct.ConstructError: the bytes end within it, or a constant is another.
    """
    return structure.parse(bytes(data[offset : offset + structure.sizeof()]))

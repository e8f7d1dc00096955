"""The active L1 table at another place, or longer: for the disk of a snapshot, a larger one, the state of a machine."""

from array import array

from pynbd.block.alignment import round_up
from pynbd.formats.qcow2.given_up import Cause
from pynbd.formats.qcow2.image import Image
from pynbd.formats.qcow2.overlap import Kind
from pynbd.formats.qcow2.tables import to_disk

SIZE_TO_L1 = (24, 48)
"""The fields of the header that tell the disk's size and where the L1 table is: in one sector, they change at once."""

L1 = (36, 48)
"""Those of the L1 table alone."""


async def replace_l1(image: Image, words: "array[int]", size: int) -> None:
    """Write another L1 table, and let the header point there. Nobody else is at work on the image.

    What the old entries led to keeps its references. The old table's clusters are given up.

    Args:
        image: the image.
        words: the new entries; all that they lead to has its references, in memory at least.
        size: the length of the disk, in bytes.

    Raises:
        OSError: it could not be written; the image is as it was.
    """
    header = image.header
    old_offset, old_bytes = header.l1_table_offset, header.l1_size * 8
    length = len(words) * 8
    offset = await image.allocate_metadata(Kind.ACTIVE_L1, length) if words else 0
    try:
        if words:
            await image.write_metadata(Kind.ACTIVE_L1, offset, _padded(words, image))
        await image.commit_all()
        await image.write_counts_now()
    except BaseException:
        await image.release_metadata(offset, length)
        raise
    # Should this fail, the new table keeps its place: either is good, whatever is on the disk.
    await image.change_fields(*SIZE_TO_L1, size=size, l1_size=len(words), l1_table_offset=offset)
    image.l1[:] = words
    if old_bytes:
        image.given_up.add(old_offset, old_bytes, Cause.OTHER, structure=True)


async def grow_l1(image: Image, entries: int) -> None:
    """Make the L1 table longer: in its clusters if there is room, else at another place. Others may be at work.

    Raises:
        OSError: it could not be written; the image is as it was.
    """
    header = image.header
    async with image.commit_lock:
        if entries <= len(image.l1):
            return
        old_offset, old_bytes = header.l1_table_offset, header.l1_size * 8
        more = array("Q", bytes(8 * (entries - len(image.l1))))
        # As it is on the disk: in memory it may point to what was not written yet.
        words = await image.read_words(old_offset, header.l1_size, "the L1 table") + more
        moves = entries * 8 > round_up(old_bytes, image.cluster_size)
        offset = await image.allocate_metadata(Kind.ACTIVE_L1, entries * 8) if moves else old_offset
        try:
            await image.write_metadata(Kind.ACTIVE_L1, offset, _padded(words, image))
            await image.write_counts_locked()
        except BaseException:
            if moves:
                await image.release_metadata(offset, entries * 8)
            raise
        await image.change_fields(*L1, l1_size=entries, l1_table_offset=offset)
        image.l1.extend(more)
        if moves and old_bytes:
            image.given_up.add(old_offset, old_bytes, Cause.OTHER, structure=True)


def _padded(words: "array[int]", image: Image) -> bytes:
    """The bytes of an L1 table, with zeroes up to the end of its last cluster."""
    data = to_disk(words)
    return data.ljust(round_up(len(data), image.cluster_size), b"\0")

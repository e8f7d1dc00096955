"""Whether the file of an image has so many holes that it is asked for them.

Most images have bytes in the file for all clusters that are in use. Where metadata are preallocated many are holes, and
the file knows better than the tables what reads as zeroes. It is asked when QEMU would ask it, so that both tell the
same of an image.
"""

import logging

from pynbd.block.errors import BlockError
from pynbd.formats.qcow2.refcounts import Refcounts, is_uniform

log = logging.getLogger(__name__)


async def has_many_holes(refcounts: Refcounts, file_bytes: int, allocated_bytes: int) -> bool:
    """Whether clearly more clusters are in use than the file has bytes for; False if counts can't be read.

    Args:
        refcounts: of the image.
        file_bytes: the length of its file.
        allocated_bytes: what that takes of its disk.
    """
    cluster = refcounts.header.cluster_size
    clusters = allocated_bytes // cluster
    enough, used = max(clusters * 10 // 9, clusters + 2), 0
    try:
        for index, start, stop in refcounts.by_block(0, -(-file_bytes // cluster)):
            block = await refcounts.block(index)
            if block is None:
                continue
            counts = block.words[start:stop]
            used += stop - start - (0 if is_uniform(counts, 1) else counts.count(0))
            if used >= enough:
                return True
    except (OSError, BlockError) as problem:
        log.debug("%s: its file is not asked for holes: %s", refcounts.image, problem)
    return False

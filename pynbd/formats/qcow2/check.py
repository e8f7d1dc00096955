"""`check` of a qcow2 image: do its reference counts agree with what refers to its clusters, and are its entries sound?

An examination (`check_examination.py`, with its scan in `check_scan.py`) tells what is wrong, `check_repair.py` mends
it; then the image is examined once more, so that what is told of as mended is.
"""

from pynbd.block.errors import BlockError
from pynbd.block.families import CheckResult, Progress, Repair, no_progress
from pynbd.formats.qcow2 import check_lists, check_repair
from pynbd.formats.qcow2.check_examination import Examination
from pynbd.formats.qcow2.image import Image


async def check(image: Image, repair: Repair = Repair.NOTHING, progress: Progress = no_progress) -> CheckResult:
    """Look through an image; mend what `repair` allows.

    Args:
        image: the image; nobody else is at work on it. What is in memory of it is written first.
        repair: what may be mended.
        progress: told while it works.

    Raises:
        OSError: the image could not be read or written, or would take too much memory or time.
    """
    if image.fence is None:
        await image.settle()
    if repair is Repair.NOTHING:
        return await Examination(image, progress).run()
    image.check_fence()
    try:
        return await _mend(image, repair, progress)
    finally:
        await image.reload()


async def _mend(image: Image, repair: Repair, progress: Progress) -> CheckResult:
    found = Examination(image, progress)
    first, first_flags = await found.run(), found.wrong_flags
    if repair is Repair.ALL and await check_repair.mend_entries(image, found):
        found = Examination(image, progress)
        await found.run()
    after, result = await _with_right_counts(image, found, repair, progress)
    if repair is Repair.ALL and not result.check_errors and await check_lists.mend_lists(image, after):
        found = Examination(image, progress)
        await found.run()
        after, result = await _with_right_counts(image, found, repair, progress)
    result.corruptions_fixed = max(first.corruptions - first_flags - (result.corruptions - after.wrong_flags), 0)
    result.leaks_fixed = max(first.leaks - result.leaks, 0)
    if repair is Repair.ALL and not result.check_errors and result.corruptions == after.wrong_flags:
        # Only now is it sure what the flags should be.
        fixed = await check_repair.mend_flags(image, after)
        result.corruptions -= fixed
        result.corruptions_fixed += fixed
    if not result.check_errors and not result.corruptions:
        await image.mark_sound()
    left = result.messages if result.corruptions or result.leaks or result.check_errors else []
    result.messages = first.messages + [f"still: {line}" for line in left]
    return result


async def _with_right_counts(
    image: Image, found: Examination, repair: Repair, progress: Progress
) -> tuple[Examination, CheckResult]:
    """Mend counts, and look again."""
    await _mend_counts(image, found, repair)
    after = Examination(image, progress)
    return after, await after.run()


async def _mend_counts(image: Image, found: Examination, repair: Repair) -> None:
    scan = found.scan
    if scan.unusable or found.needs_blocks:
        if repair is Repair.ALL:
            await check_repair.rebuild(image, found)
        return
    # What can't be told may be what a leaked cluster is needed for.
    down = not scan.uncounted and not found.result.check_errors
    await check_repair.mend_counts(image, found, up=repair is Repair.ALL, down=down)


async def repair_dirty(image: Image) -> None:
    """Repair an image that was not closed properly, before it is written to.

    Raises:
        BlockError: there is more wrong with it than that, and it can't be repaired.
        OSError: it can't be read or written.
    """
    result = await check(image, Repair.ALL)
    if result.corruptions or result.check_errors:
        raise BlockError(
            f"{image.name}: the image was not closed properly and can't be repaired: {result.corruptions} corruptions "
            f"are left, {result.check_errors} errors; {'; '.join(result.messages[:3])}"
        )

"""What can go wrong in the block layer.

    BlockError(Exception)
     ├── OptionError          a name, an option or a configuration is wrong: nothing was opened
     ├── ImageError           what was read from an image is not what its format demands
     └── PermissionConflict   a user of a node wants what another one does not share

I/O itself fails with plain `OSError` and an errno: that is what a client gets to see.
"""

import errno
import os


class BlockError(Exception):
    """Anything the block layer refuses to do, in a sentence for the person who asked."""


class OptionError(BlockError):
    """An option, a file name or a configuration is wrong; the text names it and what was allowed."""


class ImageError(BlockError):
    """An image holds something else than its format demands.

    Args:
        image: the file, as its user named it.
        problem: what is wrong, with the value found and the value expected.
        offset: where in the file, in bytes, if that is known.
    """

    def __init__(self, image: str, problem: str, offset: int | None = None) -> None:
        where = f"{image}: " if offset is None else f"{image}: at offset {offset}: "
        super().__init__(where + problem)
        self.image = image
        self.problem = problem
        self.offset = offset


class PermissionConflict(BlockError):
    """Two users of one node can't both have what they want; the text names both."""


def io_error(code: int, node: str, what: str) -> OSError:
    """An `OSError` whose text says which node, and what was asked of it."""
    return OSError(code, f"{node}: {what}: {os.strerror(code)}")


def unsupported(node: str, what: str) -> OSError:
    """The error of an operation that this driver does not have (`ENOTSUP`)."""
    return io_error(errno.ENOTSUP, node, what)

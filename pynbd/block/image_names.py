"""Names of files as they stand inside images: relative ones are meant from where the image is."""

import os

from pynbd.block import registry


def has_protocol(name: str) -> bool:
    """Whether a name is a URI, or a description (`json:…`), rather than a path."""
    scheme = name.partition(":")[0]
    return name.startswith("json:") or "://" in name or (":" in name and scheme in registry.SCHEMES)


def named_from(image: str, name: str) -> str:
    """The file name that `name` stands for inside an image.

    Args:
        image: the image's own file name; "" if it has none.
        name: a path, relative to the image's folder or absolute, or a URI.
    """
    if has_protocol(name) or name.startswith("/"):
        return name
    # No Path: "./" stays, as people wrote it, and QEMU tells it so.
    folder, slash, _ = image.rpartition("/")
    return folder + slash + name


def names_itself(image: str, name: str) -> bool:
    """Whether the file that `name` stands for inside an image is that image: one that is there, or is to be made.

    Args:
        image: the image's own file name.
        name: as for `named_from`.
    """
    return same_file(named_from(image, name), image)


def same_file(name: str, other: str) -> bool:
    """Whether two names are of one file, by way of symbolic links as well; of URIs, whether they are the same."""
    if has_protocol(name) or has_protocol(other):
        return name == other
    # No Path: importing it takes longer than all this.
    return os.path.realpath(name) == os.path.realpath(other)

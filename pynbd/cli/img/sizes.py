"""Sizes as QEMU's tools print them for people."""

UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def size_text(size_bytes: int) -> str:
    """Three significant digits and a unit: `1.5 GiB`, `196 KiB`, `0.977 KiB`, `0 B`."""
    unit = 0
    # The next unit begins at 1000 of the one before, so that there are never four digits.
    while unit + 1 < len(UNITS) and size_bytes >= 1000 << unit * 10:
        unit += 1
    return f"{size_bytes / (1 << unit * 10):.3g} {UNITS[unit]}B"

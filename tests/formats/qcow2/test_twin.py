"""The same random work done by pynbd and by QEMU 7.2: the disks stay alike, and each goes on with the other's image.

`TWIN_SEQUENCES=100` in the environment draws so many sequences for each kind of image instead of a few that are always
the same.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.formats.qcow2.twin import LARGER, OPERATIONS, SMALLER, Twins

SEQUENCES = int(os.environ.get("TWIN_SEQUENCES", "0"))

KINDS = [
    ("cluster_size=64k", ""),
    ("cluster_size=512", SMALLER),
    ("cluster_size=4k,compat=0.10", LARGER),
    ("cluster_size=4k,compat=0.10", ""),
    ("cluster_size=16k,extended_l2=on", SMALLER),
    ("cluster_size=16k,extended_l2=on", ""),
    ("cluster_size=4k,refcount_bits=1", LARGER),
    ("cluster_size=4k,refcount_bits=64,lazy_refcounts=on", SMALLER),
    ("cluster_size=8k,compression_type=zstd", LARGER),
    ("cluster_size=4k,data_file=data.raw", SMALLER),
    ("cluster_size=4k,data_file=data.raw,data_file_raw=on", ""),
]

HALF = st.lists(OPERATIONS, min_size=5, max_size=14)


# A failure tells all that was done; to find a shorter way to it would take minutes.
@pytest.mark.slow
@pytest.mark.parametrize(("options", "backing"), KINDS)
@settings(
    max_examples=SEQUENCES or 2,
    derandomize=not SEQUENCES,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
@given(first=HALF, second=HALF)
def test_twins_stay_alike(tmp_path: Path, options: str, backing: str, first: list[Any], second: list[Any]) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        twins = Twins(Path(folder), options, backing)
        for half in (first, second):
            for operation in half:
                twins.carry_out(operation)
            twins.compare()
            twins.swap()

"""`python -m tests.fuzz TARGET --minutes 60`: fuzzing by coverage, for as long as one likes.

What was found interesting is kept in .cache/fuzz, and the next run begins there. An input that breaks something is
saved in tests/fuzz/corpus, where the tests try it again from then on: mend what it broke, and commit it.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from pathlib import Path

import atheris

HERE = Path(__file__).parent
KEPT = HERE.parent.parent / ".cache" / "fuzz"

MAX_INPUT_BYTES = {"server": 2048, "client": 4096, "uri": 512, "image": 1 << 17}
MEMORY_LIMIT_BYTES = 1 << 30
TIME_LIMIT_S = 20
"""What one input may take."""

with atheris.instrument_imports(include=["nbd_protocol", "pynbd.formats.qcow2"]):
    from pynbd.block import registry
    from tests.fuzz.seeds import seeds_of, words_of
    from tests.fuzz.targets import TARGETS

    registry.driver_class("qcow2")  # otherwise it would be imported on its first use, and not be watched


def escaped(word: bytes) -> str:
    """A word of libFuzzer's dictionaries."""
    return '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"'


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--kept", type=Path, default=KEPT, metavar="DIR", help="where to keep what is interesting")
    parser.add_argument("--found", type=Path, metavar="DIR", help="where to save what breaks something")
    arguments = parser.parse_args()
    target = arguments.target
    kept, seeds = arguments.kept / target, arguments.kept / f"{target}-seeds"
    found = arguments.found or HERE / "corpus" / target
    for folder in (kept, seeds, found):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds_of(target)):
        (seeds / f"{number:04}").write_bytes(seed)
    words = arguments.kept / f"{target}.words"
    words.write_text("\n".join(escaped(word) for word in words_of(target)) + "\n")
    options = [
        f"-max_total_time={max(1, round(arguments.minutes * 60))}",
        f"-max_len={MAX_INPUT_BYTES[target]}",
        "-rss_limit_mb=0",  # it would count what the process that has started this one once had
        f"-timeout={TIME_LIMIT_S}",
        f"-artifact_prefix={found}{os.sep}",
        f"-dict={words}",
        "-use_value_profile=1",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(kept), str(seeds), str(HERE / "corpus" / target)], TARGETS[target])
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    atheris.Fuzz()


main()

"""pynbd measured beside qemu-nbd and nbdkit: `python -m tests.benchmarks`, or `make bench`."""

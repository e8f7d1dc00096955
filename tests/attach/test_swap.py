"""Swap space on an export: memory that the guest's kernel needs for other things goes to the server and comes back."""

from __future__ import annotations

import pytest

from tests.attach.disks import allocated_bytes
from tests.attach.guest import Guest
from tests.attach.nbd_client import attached
from tests.attach.server import ServerUnderTest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

MEMORY_LIMIT_BYTES = 4 << 20
WRITTEN_BYTES = 10 << 20
SWAPPED_BYTES = 4 << 20
"""Of what is written, at least this much can't stay within the limit, whatever the kernel keeps beside it."""

FILL_MEMORY = f"""
mkdir /tmp/cgroup && mount -t cgroup2 none /tmp/cgroup && echo +memory >/tmp/cgroup/cgroup.subtree_control &&
mkdir /tmp/cgroup/small && echo {MEMORY_LIMIT_BYTES} >/tmp/cgroup/small/memory.max &&
head -c 1048576 /dev/urandom >/tmp/piece && sh -c '
    echo $$ >/tmp/cgroup/small/cgroup.procs
    for n in $(seq {WRITTEN_BYTES >> 20}); do echo $n; cat /tmp/piece; done >/tmp/large'
"""

VERIFY = f"for n in $(seq {WRITTEN_BYTES >> 20}); do echo $n; cat /tmp/piece; done | cmp - /tmp/large"


def test_memory_is_swapped_out_and_in(guest: Guest, server: ServerUnderTest) -> None:
    with attached(guest, server, "-swap") as device:
        guest.run(f"mkswap {device} && swapon {device}")
        assert device in guest.run("cat /proc/swaps")
        guest.run(FILL_MEMORY)
        assert int(guest.run("cat /tmp/cgroup/small/memory.swap.current")) >= SWAPPED_BYTES
        assert allocated_bytes(server.disk) >= SWAPPED_BYTES
        guest.run(VERIFY)
        guest.run(f"echo max >/tmp/cgroup/small/memory.max && swapoff {device} && {VERIFY}")
        assert device not in guest.run("cat /proc/swaps")

#!/usr/bin/env python3
"""Tells the kernel that the disk behind an attached /dev/nbdN has another size.

    nbd_set_size.py /dev/nbd0 2147483648

Sends NBD_CMD_RECONFIGURE of the netlink family "nbd" (linux/nbd-netlink.h), for which nbd-client 3.24 has no option.
Needs root, Linux 4.12 or later, and nothing but Python's standard library.
"""

import os
import socket
import struct
import sys

NETLINK_GENERIC = 16
GENL_ID_CTRL = 16
CTRL_CMD_GETFAMILY = 3
CTRL_ATTR_FAMILY_ID = 1
CTRL_ATTR_FAMILY_NAME = 2

NBD_CMD_RECONFIGURE = 3
NBD_ATTR_INDEX = 1
NBD_ATTR_SIZE_BYTES = 2

NLM_F_REQUEST = 1
NLM_F_ACK = 4
NLMSG_ERROR = 2

HEADER = struct.Struct("=IHHIIBBH")  # struct nlmsghdr, then struct genlmsghdr
ERROR = struct.Struct("=IHHIIi")  # struct nlmsghdr, then the errno of struct nlmsgerr
ATTRIBUTE = struct.Struct("=HH")  # struct nlattr: length with this, type


def attribute(kind, value):
    """One netlink attribute, padded."""
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def ask(netlink, family, command, attributes, flags=0):
    """Send a command and return the attributes of its answer, by number; raises OSError if the kernel refuses."""
    length = HEADER.size + len(attributes)
    netlink.send(HEADER.pack(length, family, NLM_F_REQUEST | flags, 1, 0, command, 1, 0) + attributes)
    answer = netlink.recv(65536)
    if HEADER.unpack_from(answer)[1] == NLMSG_ERROR:
        problem = -ERROR.unpack_from(answer)[-1]
        if problem:
            raise OSError(problem, os.strerror(problem))
        return {}
    found = {}
    at = HEADER.size
    while at + ATTRIBUTE.size <= len(answer):
        length, kind = ATTRIBUTE.unpack_from(answer, at)
        found[kind] = answer[at + ATTRIBUTE.size : at + length]
        at += max(length + -length % 4, ATTRIBUTE.size)
    return found


def set_size(index, size_bytes):
    """Make /dev/nbdINDEX as long as this; raises OSError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC) as netlink:
        netlink.bind((0, 0))
        named = attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0")
        family = struct.unpack("=H", ask(netlink, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, named)[CTRL_ATTR_FAMILY_ID])[0]
        wanted = attribute(NBD_ATTR_INDEX, struct.pack("=I", index))
        wanted += attribute(NBD_ATTR_SIZE_BYTES, struct.pack("=Q", size_bytes))
        ask(netlink, family, NBD_CMD_RECONFIGURE, wanted, NLM_F_ACK)


def main(words):
    """`nbd_set_size.py DEVICE BYTES`; the exit status."""
    if len(words) != 2 or not words[0].startswith("/dev/nbd") or not words[1].isdigit():
        print("usage: nbd_set_size.py /dev/nbdN BYTES", file=sys.stderr)
        return 2
    try:
        set_size(int(words[0].removeprefix("/dev/nbd")), int(words[1]))
    except OSError as problem:
        print(f"nbd_set_size.py: {words[0]}: {problem.strerror}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

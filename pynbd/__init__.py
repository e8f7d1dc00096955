"""pynbd: software-defined disks. A graph of block drivers in asyncio Python, served over NBD.

from pynbd import Driver, Filter        # write your own storage or filter
from pynbd import Graph, BlockBackend   # open and use disks from your own program
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pynbd.block.backend import BlockBackend as BlockBackend
    from pynbd.block.driver import ChildSpec as ChildSpec
    from pynbd.block.driver import Driver as Driver
    from pynbd.block.driver import Filter as Filter
    from pynbd.block.extents import Extent as Extent
    from pynbd.block.extents import Status as Status
    from pynbd.block.graph import Graph as Graph
    from pynbd.block.options import NodeOptions as NodeOptions
    from pynbd.block.permissions import ChildRole as ChildRole
    from pynbd.block.requests import RequestFlag as RequestFlag

__version__ = "0.1.0"

_PUBLIC = {
    "BlockBackend": "pynbd.block.backend",
    "ChildRole": "pynbd.block.permissions",
    "ChildSpec": "pynbd.block.driver",
    "Driver": "pynbd.block.driver",
    "Extent": "pynbd.block.extents",
    "Filter": "pynbd.block.driver",
    "Graph": "pynbd.block.graph",
    "NodeOptions": "pynbd.block.options",
    "RequestFlag": "pynbd.block.requests",
    "Status": "pynbd.block.extents",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used: `pynbd --help` needs none of them."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

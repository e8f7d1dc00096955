"""`Node`: one opened driver in the graph. This is the seed's `struct BlockDriverState`.

A node adds to its driver what no driver should have to write itself: all that requests may need (`NodeRequests`),
dirty bitmaps, and the status of a whole chain. What a node does not need, its requests do not pay for: see `relink`.
"""

import contextlib
import errno
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pynbd.block import status
from pynbd.block.alignment import round_down
from pynbd.block.child import Child
from pynbd.block.data_path import DataPath, by_nobody, never, no_finder, no_place, not_now, nowhere
from pynbd.block.driver import Driver, Filter, ImageInfo, Preallocation
from pynbd.block.errors import io_error
from pynbd.block.extents import ChainExtent, Extent
from pynbd.block.node_requests import NodeRequests
from pynbd.block.objects import Objects
from pynbd.block.options import MAX_SIZE_BYTES, NodeOptions
from pynbd.block.permissions import Permission
from pynbd.block.requests import RequestTracker

if TYPE_CHECKING:
    from pynbd.block.child import User
    from pynbd.block.drain import DrainedSection

MAX_STATUS_EXTENTS = status.MAX_STATUS_EXTENTS

_numbers = itertools.count()


class Node(NodeRequests):
    """One opened driver, its children, and what the block layer keeps for it.

    Args:
        driver: not yet opened; the graph opens it once the children are attached.
        options: what every node takes, and the driver's own.
        objects: secrets and the like that the options may refer to by id.
        shared: whether this process is one of several that have the disk open; see `Graph`.
    """

    def __init__(self, driver: Driver, options: NodeOptions, objects: Objects, *, shared: bool = False) -> None:
        super().__init__(driver, options, options.node_name or f"#{driver.name}{next(_numbers)}")
        self.objects = objects
        self.shared = shared
        self.parents: list[Child] = []
        self.opened = False
        self.drained_sections: list[DrainedSection] = []
        self._tracking_users = 0
        driver.node = self
        self.path = self._own_path()

    def __repr__(self) -> str:
        return f"<Node {self.name} driver={self.driver.name}>"

    def describe(self) -> str:
        """For messages."""
        return f"node {self.name!r}"

    @property
    def is_filter(self) -> bool:
        """Whether it shows exactly the bytes of its child `file`."""
        return isinstance(self.driver, Filter)

    # --- the data path ------------------------------------------------------------------------------------

    def relink(self) -> None:
        """Bind the data path of this node, and then of all nodes above it, anew.

        A node that adds nothing to a kind of request is left out of that request's way: its path holds the
        function of the node below. Only called while nothing is in flight.
        """
        for node in self.with_nodes_above():
            node.bind_path()

    def with_nodes_above(self) -> list["Node"]:
        """This node and all above it, each before its parents, and once, however many ways lead there."""
        order: list[Node] = []
        seen: set[Node] = set()

        def visit(node: Node) -> None:
            seen.add(node)
            for edge in node.parents:
                if isinstance(edge.parent, Node) and edge.parent not in seen:
                    visit(edge.parent)
            order.append(node)

        visit(self)
        return order[::-1]

    def bind_path(self) -> None:
        """Work out the data path of this node from those of its children."""
        for child in self.children.values():
            child.bind()
        own, passed = self._own_path(), set[str]()
        self.growable = self.driver.growable
        if "file" in self.children:
            below = self.children["file"].node
            passed = {name for name in DataPath._fields if self._left_out_of(name)}
            own = DataPath(*(getattr(below.path if name in passed else own, name) for name in DataPath._fields))
            self.growable = self.growable or (self.is_filter and below.growable)
        self._counts_writes = not self.shared and "write" not in passed
        self.path = own
        for edge in self.parents:
            edge.bind()
            if not isinstance(edge.parent, Node):
                edge.parent.below_changed(edge)

    def _own_path(self) -> DataPath:
        self._counts_writes = not self.shared  # others write as well, and what they were told of is to be flushed here
        driver, limits = self.driver, self.driver.limits
        plain = self._tracker is None and limits.request_alignment == 1 and limits.max_transfer == 0
        unwatched = self.write_guard is None and self.options.detect_zeroes == "off"
        immediate = plain and unwatched and type(driver).write_now is not Driver.write_now
        placed = plain and unwatched and type(driver).place_writes is not Driver.place_writes
        in_memory = plain and unwatched and type(driver).fill_now is not Driver.fill_now
        by_others = plain and unwatched and type(driver).write_by is not Driver.write_by
        return DataPath(
            read=self._read if not plain else self.calls.read if driver.zero_past_end else self._read_plain,
            write=self._write_plain if plain and unwatched else self._write,
            write_zeroes=self._write_zeroes,
            discard=self._discard,
            cache=self.calls.cache,
            flush=self.flush,
            locate=driver.locate if type(driver).locate is not Driver.locate else nowhere,
            finder=driver.finder if type(driver).finder is not Driver.finder else no_finder,
            write_now=self._write_now if immediate else not_now,
            place_writes=self._place_writes if placed else no_place,
            fill_now=self._fill_now if in_memory else never,
            write_by=self._write_by if by_others else by_nobody,
        )

    def _left_out_of(self, request: str) -> bool:
        """Whether requests of this kind may go straight to the child `file`."""
        driver = self.driver
        if request == "flush":
            own_steps = not (driver.passes("flush_to_os") and driver.passes("flush_to_disk"))
            return not own_steps and len(self.children) == 1
        if not driver.passes(request):
            return False
        if request in ("read", "cache", "locate", "finder"):
            return self._tracker is None or request in ("locate", "finder")
        # What one kind of write needs the node for, the others need it for too: bitmaps, tracking and policy.
        return (
            self._tracker is None
            and not self.bitmaps
            and self.write_guard is None
            and self.options.detect_zeroes == "off"
            and (request in ("write", "write_now", "place_writes", "fill_now", "write_by") or self._discards)
        )

    def below_changed(self, edge: Child) -> None:
        """A node below has another data path."""
        self.relink()

    # --- tracking -----------------------------------------------------------------------------------------

    def needs_tracking(self, *, on: bool) -> None:
        """Somebody needs overlapping requests to be serialised (or no longer). Only while drained."""
        self._tracking_users += 1 if on else -1
        assert self._tracking_users >= 0
        self._tracker = (self._tracker or RequestTracker()) if self._tracking_users else None
        self.relink()

    @property
    def tracked_requests(self) -> Sequence[tuple[int, int, bool]]:
        """(offset, length, serialising) of what is in flight, as far as it is tracked."""
        tracker = self._tracker
        return [] if tracker is None else [(r.offset, r.end - r.offset, r.serialising) for r in tracker.in_flight]

    # --- what lies where ----------------------------------------------------------------------------------

    async def layer_status(self, offset: int, length: int) -> Sequence[Extent]:
        """What this layer holds in a range; see `status.layer_status`. Never empty for a length over 0."""
        return await status.layer_status(self, offset, length)

    def backing(self) -> "Node | None":
        """What lies below this image in its chain, filters above the image passed over."""
        child = status.without_filters(self).children.get("backing")
        return child.node if child is not None else None

    async def block_status(self, offset: int, length: int, base: "Node | None" = None) -> list[ChainExtent]:
        """What the chain of images from here down to `base` (not included) holds in a range.

        Returns:
            extents from `offset` on, at least one for a length over 0; they may stop before the end of the range.
        """
        return await status.chain_status(self, offset, length, base, depth=1)

    # --- size and shape -----------------------------------------------------------------------------------

    async def truncate(
        self, size: int, preallocation: Preallocation = Preallocation.OFF, *, exact: bool = True
    ) -> None:
        """Change the length of the disk.

        Raises:
            OSError: it can't be changed; the size is what it was, or `self.size` says what it became.
        """
        if self.read_only:
            raise io_error(errno.EROFS, self.name, "resize of a read-only node")
        if not 0 <= size <= MAX_SIZE_BYTES or not all(bitmap.can_cover(size) for bitmap in self.bitmaps.values()):
            raise io_error(errno.EFBIG, self.name, f"resize to {size} bytes")
        async with contextlib.AsyncExitStack() as held:
            if self.write_guard is not None and self.size < self.write_guard.length:
                await held.enter_async_context(self.write_guard.lock)
                await self.write_guard.check(self.size, memoryview(bytes(self.write_guard.length)))
            if self._tracker is not None:
                # Blocks that are being modified must not be written back behind the new end.
                start = round_down(min(size, self.size), self.driver.limits.request_alignment)
                tracked = self._tracker.track(start, MAX_SIZE_BYTES, serialising=True)
                await held.enter_async_context(tracked)
            try:
                await self.calls.truncate(size, preallocation, exact=exact)
            finally:
                self._generation += 1
                if self.size != self._told_size:
                    self.resized()

    def start(self) -> None:
        """The driver has opened: begin to serve."""
        self.opened = True
        self._told_size = self.size
        if self.driver.limits.request_alignment > 1:
            self.needs_tracking(on=True)
        else:
            self.relink()

    def resized(self) -> None:
        """The driver's `size` is another: tell everybody above."""
        self._told_size = self.size
        for bitmap in self.bitmaps.values():
            bitmap.resize(self.size)
        for edge in self.parents:
            edge.parent.below_resized(edge)

    def below_resized(self, edge: Child) -> None:
        """A child has another size."""
        self.driver.child_resized(edge.name)
        if self.opened and self.size != self._told_size:
            self.resized()

    def users(self) -> Iterator["User"]:
        """Everybody who sends requests to this node, straight or through nodes above; some may come twice."""
        for node in self.with_nodes_above():
            for edge in node.parents:
                if not isinstance(edge.parent, Node):
                    yield from edge.parent.users()

    async def allocated_size(self) -> int | None:
        """Bytes used on the host by this node and the files below it (not its backing chain)."""
        return await self.calls.allocated_size()

    async def info(self) -> ImageInfo:
        """What is worth telling beyond the size."""
        return await self.calls.info()

    def filename(self) -> str:
        """The name of the storage under this node, for people; "" if it has none."""
        own = self.driver.filename()
        child = self.children.get("file")
        return own if own or child is None else child.node.filename()

    # --- permissions --------------------------------------------------------------------------------------

    def held_by_parents(self) -> tuple[Permission, Permission]:
        """(all that the parents hold together, what every one of them shares)."""
        held, shared = Permission.NONE, Permission.ALL
        for edge in self.parents:
            held |= edge.held
            shared &= edge.shared
        return held, shared

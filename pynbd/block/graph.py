"""`Graph`: all nodes of a process, how they are opened from a description, joined, changed and closed.

A change of the graph is checked as a whole and then made or dropped, inside a drained section: nothing is in
flight in the part that changes.
"""

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from pynbd.block import options as opt
from pynbd.block import probing, registry
from pynbd.block.adapt import adapt, is_built_in
from pynbd.block.backend import BlockBackend
from pynbd.block.bitmaps import DEFAULT_GRANULARITY_BYTES, DirtyBitmap
from pynbd.block.chains import MAX_CHAIN_DEPTH, allow_depth, chain_depth, check_goes_on
from pynbd.block.child import Child
from pynbd.block.drain import downwards, drained, join_sections
from pynbd.block.driver import Driver
from pynbd.block.errors import BlockError, OptionError
from pynbd.block.limits import Limits
from pynbd.block.node import Node
from pynbd.block.objects import Objects
from pynbd.block.options import MAX_SIZE_BYTES, NodeOptions
from pynbd.block.permissions import Permission, check_conflicts

log = logging.getLogger(__name__)

MAX_BITMAPS = 65535
"""Dirty bitmaps of one node; as many as qcow2 can keep."""

URI_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")

NODE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,254}")
"""Names that a node may be given. Those that are made up begin with `#`, so the two never meet."""

INHERITED = ("read-only", "auto-read-only", "force-share", "cache")
"""Options that a child takes over from its parent when it says nothing itself."""


class Plan(NamedTuple):
    """A node that is going to be opened: everything checked that can be without opening it."""

    kind: type[Driver]
    options: NodeOptions
    children: "dict[str, Plan | Node]"
    forbidden: frozenset[str] = frozenset()
    """Children that are not to be opened, although the image may name them (`backing=null`)."""
    for_check: bool = False
    for_info: bool = False


class Graph:
    """The nodes of one process, by name.

    Args:
        objects: secrets and the like that nodes refer to by id; others may be made later.
        shared: whether this process is one of several that have the same disks open, and another one of them has opened
            them before and holds the locks. Files are locked, but none of the others is taken for a stranger; a flush
            always has something to do, for the others write as well.
        runs_files: whether a file name that ends in `.py` is a driver, which is run. Otherwise it is a disk like
            others, and only `driver` names one that is run.
    """

    def __init__(self, objects: Objects | None = None, *, shared: bool = False, runs_files: bool = True) -> None:
        self.shared = shared
        self.runs_files = runs_files
        self.nodes: dict[str, Node] = {}
        self.objects = Objects() if objects is None else objects
        self._foreseen: frozenset[str] = frozenset()
        self._opening: set[str] = set()

    # --- opening ------------------------------------------------------------------------------------------

    async def open(
        self,
        description: str | Mapping[str, Any],
        *,
        format: str = "",
        trusted: bool = True,
        for_check: bool = False,
        for_info: bool = False,
        above: tuple[str, ...] = (),
        **defaults: Any,
    ) -> Node:
        """Open a node, and everything below it.

        Args:
            description: a file name, a URI, dotted keys, `json:{…}`, or the tree itself.
            format: the format of an image that is given by name; probed if empty.
            trusted: whether a person wrote it. What an image names opens only drivers of an allow-list.
            for_check: whether the top node is opened only to be checked or mended (see `Driver.for_check`).
            for_info: whether it is opened only to be described (see `Driver.for_info`).
            above: the file names of the images that are being opened on top of it.
            defaults: options of the top node (`read_only=True`); a trusted description may override them.

        Raises:
            OptionError: the description is wrong.
            OSError, BlockError: something can't be opened; nothing stays open.
        """
        tree = self.describe(description, format=format, trusted=trusted)
        given = {name.replace("_", "-"): value for name, value in defaults.items()}
        tree = given | tree if trusted else tree | given
        if "driver" not in tree:
            return await self._open_probed(tree, trusted=trusted, for_check=for_check, for_info=for_info, above=above)
        plan = self._plan(tree, "", trusted=trusted, depth=0)
        return await self._open_plan(plan._replace(for_check=for_check, for_info=for_info), above)

    def describe(
        self, description: str | Mapping[str, Any], *, format: str = "", trusted: bool = True
    ) -> dict[str, Any]:
        """The tree that a description stands for; without `driver` if the format is to be probed.

        Raises:
            OptionError: it can't be understood.
        """
        if isinstance(description, Mapping):
            tree = dict(description)
        elif description.startswith("json:"):
            tree = opt.parse_json(description)
        elif description.startswith("driver="):
            tree = opt.parse_dotted(description)
        else:
            return self._from_name(description, format, trusted=trusted)
        if "driver" not in tree and "filename" in tree:
            name = str(tree.pop("filename"))
            tree = self._from_name(name, format, trusted=trusted) | tree
        elif format and tree.get("driver", format) != format:
            raise OptionError(f"format {format!r} was asked for, but the description says driver {tree['driver']!r}")
        elif format:
            tree["driver"] = format
        return tree

    def _from_name(self, name: str, format: str, *, trusted: bool) -> dict[str, Any]:
        storage = self.storage_tree(name, trusted=trusted)
        if registry.is_python_file(storage["driver"]) and not format:
            return storage
        if format and "file" not in registry.driver_class(format, trusted=trusted).children:
            return {**storage, "driver": format}  # storage itself, whose bytes are the disk as they are
        return {"driver": format, "file": storage} if format else {"file": storage}

    def storage_tree(self, name: str, *, trusted: bool = True) -> dict[str, Any]:
        """The options of the storage that a file name or a URI stands for.

        Raises:
            OptionError: a URI is wrong.
        """
        if trusted and self.runs_files and registry.is_python_file(name):
            return {"driver": name}
        scheme = name.partition(":")[0]
        if scheme in registry.SCHEMES and ":" in name:
            kind = registry.driver_class(registry.SCHEMES[scheme], trusted=trusted)
            return {"driver": kind.name, **kind.parse_filename(name)}
        if "://" in name and URI_SCHEME.fullmatch(scheme):
            known = ", ".join(f"{known}://" for known in sorted(registry.SCHEMES))
            raise OptionError(f"{name}: no driver for {scheme}://; there are: {known} (write ./{name} for a file)")
        if not name:
            raise OptionError("an empty file name")
        device = registry.driver_class("host_device", trusted=trusted)
        return {"driver": device.name if device.probe_device(name) else "file", "filename": name}

    async def _open_probed(
        self, tree: dict[str, Any], *, trusted: bool, for_check: bool, for_info: bool, above: tuple[str, ...]
    ) -> Node:
        """Open an image whose format nobody said."""
        if "file" not in tree:
            raise OptionError(f"no driver is given (options: {', '.join(sorted(tree)) or 'none'})")
        plan = self._plan_child("file", tree["file"], tree, "", trusted=trusted, depth=1)
        storage = plan if isinstance(plan, Node) else await self._open_plan(plan)
        try:
            head = await probing.read_head(storage)
            name = probing.probe_format(head, storage.filename() or storage.name)
            top = self._plan({**tree, "driver": name, "file": storage}, "", trusted=trusted, depth=0)
            node = await self._open_plan(top._replace(for_check=for_check, for_info=for_info), above)
        except BaseException:
            if not isinstance(plan, Node):
                await self._close_unused([storage])
            raise
        if name == probing.RAW and not node.read_only:
            node.write_guard = probing.ProbedRawGuard(node)
            node.relink()
        return node

    def check(self, tree: Mapping[str, Any], *, known: Collection[str] = ()) -> None:
        """Check a tree as far as that can be done without opening anything.

        Args:
            tree: as `describe` gives it.
            known: names of nodes that are going to be there.

        Raises:
            OptionError: the description is wrong.
        """
        self._foreseen = frozenset(known)
        try:
            if "driver" in tree:
                self._plan(tree, "", trusted=True, depth=0)
            elif "file" in tree:
                self._plan_child("file", tree["file"], tree, "", trusted=True, depth=1)
            else:
                raise OptionError(f"no driver is given (options: {', '.join(sorted(tree)) or 'none'})")
        finally:
            self._foreseen = frozenset()

    # --- planning -----------------------------------------------------------------------------------------

    def _plan(self, tree: Mapping[str, Any], path: str, *, trusted: bool, depth: int) -> Plan:
        if depth > opt.MAX_OPTION_DEPTH:
            raise OptionError(f"{path}: more than {opt.MAX_OPTION_DEPTH} levels of nodes")
        name = tree.get("driver")
        if not isinstance(name, str) or not name:
            raise OptionError(f"{path}driver: the driver's name is missing")
        kind = registry.driver_class(name, trusted=trusted)
        tree = own_child_names(tree, kind, path)
        own = {key: value for key, value in tree.items() if key not in kind.children}
        if own.get("backing", "") is None:
            del own["backing"]  # who has no backing file can be opened without it, whatever the format turns out to be
        for key, value in own.items():
            # A key that looks like a child the driver does not have deserves more than "unknown option".
            if isinstance(value, Mapping) and "driver" in value and key not in field_names(kind.Options):
                raise opt.unknown_option(path, key, kind.name, [*kind.children, *field_names(kind.Options)])
        options = opt.convert(own, kind.Options, path=path, driver=kind.name)
        if options.node_name in self.nodes:
            raise OptionError(f"{path}node-name: there is a node {options.node_name!r} already")
        if options.node_name and not NODE_NAME.fullmatch(options.node_name):
            raise OptionError(
                f"{path}node-name: {options.node_name[:80]!r} is no name: write a letter, then up to 254 letters, "
                f"digits, '-', '.' and '_'"
            )
        children: dict[str, Plan | Node] = {}
        for child, spec in kind.children.items():
            if tree.get(child) is not None:
                inherit = {**tree, "read-only": True} if not spec.writable else tree
                children[child] = self._plan_child(child, tree[child], inherit, path, trusted=trusted, depth=depth + 1)
            elif not spec.optional:
                raise OptionError(f"{path}{child}: driver {kind.name!r} needs a node here")
        forbidden = frozenset(child for child in kind.children if child in tree and tree[child] is None)
        plan = Plan(kind, options, children, forbidden)
        names = list(given_names(plan))
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise OptionError(f"{path}node-name: {twice!r} is given to two nodes")
        return plan

    def _plan_child(
        self, name: str, value: Any, parent: Mapping[str, Any], path: str, *, trusted: bool, depth: int
    ) -> "Plan | Node":
        """A child: the name of an open node, or a tree of its own that takes over some of its parent's options."""
        if isinstance(value, Node):
            return value
        if isinstance(value, str):
            if not trusted:
                raise OptionError(f"{path}{name}: an image can't name a node ({value[:80]!r})")
            if value in self._foreseen:
                return Plan(Driver, NodeOptions(), {})
            node = self.nodes.get(value)
            if node is None:
                raise OptionError(
                    f"{path}{name}: there is no node {value!r}; open are: {', '.join(self.nodes) or 'none'}"
                )
            return node
        if not isinstance(value, Mapping):
            raise OptionError(f"{path}{name}: expected the name of a node or its options, found {value!r}")
        tree = dict(value)
        if "driver" not in tree and "filename" in tree:
            tree = self.storage_tree(str(tree.pop("filename")), trusted=trusted) | tree
        inherited = {key: parent[key] for key in INHERITED if key in parent}
        # A parent decides which discards it passes down; what it does pass is meant.
        return self._plan({"discard": "unmap", **inherited, **tree}, f"{path}{name}.", trusted=trusted, depth=depth)

    async def _open_plan(self, plan: Plan, above: tuple[str, ...] = ()) -> Node:
        """Open the children, then the node on top of them."""
        opened: list[Node] = []
        try:
            children: dict[str, Node] = {}
            for name, below in plan.children.items():
                child = below if isinstance(below, Node) else await self._open_plan(below, above)
                if child is not below:
                    opened.append(child)
                children[name] = child
            return await self._open_node(plan, children, above)
        except BaseException:
            await self._close_unused(opened)
            raise

    async def _open_node(self, plan: Plan, children: Mapping[str, Node], above: tuple[str, ...]) -> Node:
        node = Node(plan.kind(plan.options), plan.options, self.objects, shared=self.shared)
        if node.name in self.nodes or node.name in self._opening:
            raise OptionError(f"node-name: there is a node {node.name!r} already")
        self._opening.add(node.name)
        try:
            await self._open_driver(node, plan, children, above)
        finally:
            self._opening.remove(node.name)
        self.nodes[node.name] = node
        node.start()
        return node

    async def _open_driver(self, node: Node, plan: Plan, children: Mapping[str, Node], above: tuple[str, ...]) -> None:
        """Join a new node to its children, and open its driver; if that fails, the children are as before."""
        driver = node.driver
        driver.for_check, driver.for_info = plan.for_check, plan.for_info
        named: dict[str, Node] = {}
        try:
            self._join(node, plan, children)
            if not is_built_in(plan.kind):
                node.calls = adapt(driver)
            if type(driver).named_children is not Driver.named_children:
                await self._open_named(node, plan, above, named)
                self._join(node, plan, named)
            await node.calls.open()
        except BaseException:
            self._cut_children(node)
            await self._close_unused(named.values())
            raise
        if not 0 <= driver.size <= MAX_SIZE_BYTES:
            try:
                await node.calls.close()
            finally:
                self._cut_children(node)
            raise BlockError(
                f"{node.name}: driver {driver.name} has a size of {driver.size}, expected 0 to {MAX_SIZE_BYTES}"
            )

    def _join(self, node: Node, plan: Plan, children: Mapping[str, Node]) -> None:
        """Make the edges from a new node to some children, who may be there for others as well."""
        for child in children.values():
            if not child.opened:
                raise BlockError(f"{child.describe()} is being closed")
        depth = 1 + max((chain_depth(child) for child in children.values()), default=0)
        if depth > MAX_CHAIN_DEPTH:
            raise BlockError(f"{node.name}: a chain of more than {MAX_CHAIN_DEPTH} nodes")
        allow_depth(depth)
        for name, child in children.items():
            edge = Child(name, plan.kind.children[name].role, node, child)
            child.parents.append(edge)
            node.children[name] = edge
            if plan.options.auto_read_only and child.read_only and plan.kind.children[name].writable:
                node.read_only = True
        self.update_permissions([node])
        for name in children:
            node.driver.child_resized(name)
        node.relink()

    async def _open_named(self, node: Node, plan: Plan, above: tuple[str, ...], named: dict[str, Node]) -> None:
        """Open the children that an image names, as far as nobody gave or forbade them; they are put into `named`."""
        filename = node.filename()
        for name, description in (await node.driver.named_children()).items():
            if name in node.children or name in plan.forbidden:
                continue
            if isinstance(description, Node):
                named[name] = description
                continue
            check_goes_on(filename, above, node.name)
            allow_depth(len(above) + 1)
            options = msgspec.to_builtins(plan.options)
            inherited = {key: options[key] for key in INHERITED if key in options}
            if not plan.kind.children[name].writable:
                inherited["read-only"] = True
            given = {key.replace("-", "_"): value for key, value in inherited.items()}
            try:
                named[name] = await self.open(
                    description, trusted=False, above=(*above, filename), **{"discard": "unmap", **given}
                )
            except (OSError, BlockError) as problem:
                what = f"{filename or node.name}: its {name} can't be opened: {problem}"
                raise (OSError(problem.errno, what) if isinstance(problem, OSError) else BlockError(what)) from problem

    def _cut_children(self, node: Node) -> None:
        for edge in node.children.values():
            edge.node.parents.remove(edge)
        below = [edge.node for edge in node.children.values()]
        node.children.clear()
        self.update_permissions(below)

    # --- closing ------------------------------------------------------------------------------------------

    async def close(self, node: Node) -> None:
        """Flush and close a node that nobody uses, and then every child that nobody else uses.

        Raises:
            OSError: something could not be flushed; all the same it is closed, and so is everything below.
            BlockError: somebody uses it, or it is being closed already.
        """
        if node.parents:
            users = ", ".join(edge.describe() for edge in node.parents)
            raise BlockError(f"{node.describe()} is in use by {users}")
        if not node.opened:
            raise BlockError(f"{node.describe()} is being closed already")
        node.opened = False
        try:
            if not node.read_only:
                await node.path.flush()
        finally:
            below = [edge.node for edge in node.children.values()]
            try:
                await node.calls.close()
            finally:
                self.nodes.pop(node.name, None)
                self._cut_children(node)
                await self._close_unused(below)

    async def _close_unused(self, nodes: Iterable[Node]) -> None:
        """Close those of some nodes that nobody uses; the first error is raised when all are closed."""
        first: BaseException | None = None
        for node in nodes:
            if node.opened and not node.parents:
                try:
                    await self.close(node)
                except (OSError, BlockError) as problem:
                    first = first or problem
        if first is not None:
            raise first

    async def close_all(self) -> None:
        """Close every node that no backend is attached to; errors are logged, and the first is raised at the end.

        Raises:
            OSError, BlockError: something could not be flushed or closed; everything else is closed.
        """
        first: BaseException | None = None
        while tops := [node for node in self.nodes.values() if node.opened and not node.parents]:
            for node in tops:
                try:
                    await self.close(node)
                except (OSError, BlockError) as problem:
                    log.error("closing %s: %s", node.name, problem)
                    first = first or problem
        if first is not None:
            raise first

    # --- users --------------------------------------------------------------------------------------------

    def attach(
        self,
        backend: BlockBackend,
        node: Node,
        held: Permission = Permission.CONSISTENT_READ,
        shared: Permission = Permission.ALL,
    ) -> None:
        """Give a user its node.

        Args:
            backend: the user, not attached yet.
            node: the node.
            held: what it wants to do.
            shared: what it lets others do meanwhile.

        Raises:
            PermissionConflict: somebody else's permissions stand against it, or something is read-only; it is not
                attached.
            BlockError: the node is being closed.
        """
        if not node.opened:
            raise BlockError(f"{node.describe()} is being closed")
        edge = backend.attach(node)
        try:
            self.update_permissions([node], {edge: (held, shared)})
        except BaseException:
            backend.detach()
            raise
        join_sections(node, [backend])

    def detach(self, backend: BlockBackend) -> None:
        """Take a user's node away. Nothing of it may be in flight."""
        node = backend.node
        backend.detach()
        self.update_permissions([node])

    def update_permissions(
        self, changed: Iterable[Node], wanted: Mapping[Child, tuple[Permission, Permission]] | None = None
    ) -> None:
        """Work out the permissions of all edges below some nodes, check them all, then set them all.

        Args:
            changed: the nodes whose parents changed.
            wanted: (held, shared) that edges from above are to get.

        Raises:
            PermissionConflict: two edges don't go together, or a file is locked by another process; nothing changed.
        """
        new = dict(wanted or {})
        checked: list[Node] = []
        order = downwards(changed)
        try:
            for node in order:
                held, shared = Permission.NONE, Permission.ALL
                for edge in node.parents:
                    edge_held, edge_shared = new.get(edge, (edge.held, edge.shared))
                    held |= edge_held
                    shared &= edge_shared
                check_conflicts(node, new)
                checked.append(node)
                node.driver.check_permissions(held, shared)
                for name, edge in node.children.items():
                    new[edge] = node.driver.child_permissions(name, held, shared)
        except BaseException:
            for node in reversed(checked):
                node.driver.abort_permissions(*node.held_by_parents())
            raise
        for edge, (edge_held, edge_shared) in new.items():
            edge.held, edge.shared = edge_held, edge_shared
        for node in order:
            node.driver.commit_permissions(*node.held_by_parents())

    # --- bitmaps ------------------------------------------------------------------------------------------

    async def add_bitmap(self, node: Node, name: str, granularity: int = DEFAULT_GRANULARITY_BYTES) -> DirtyBitmap:
        """Begin to note which parts of a node are written. Every write that is answered from now on is in it.

        Args:
            node: the node.
            name: of the bitmap, new on this node.
            granularity: bytes that one bit stands for, a power of two.

        Raises:
            BlockError: there is one of that name, there are too many, or name or granularity are out of range.
        """
        if name in node.bitmaps:
            raise BlockError(f"{node.describe()} has a bitmap {name!r} already")
        if len(node.bitmaps) >= MAX_BITMAPS:
            raise BlockError(f"{node.describe()} has {MAX_BITMAPS} bitmaps, the most there may be")
        bitmap = node.bitmaps[name] = DirtyBitmap(name, node.size, granularity)
        # Writes that are under way may pass the node by; from the next one on none does.
        async with drained(node):
            bitmap.resize(node.size)
            node.relink()
        return bitmap

    async def remove_bitmap(self, node: Node, name: str) -> None:
        """Forget a bitmap.

        Raises:
            BlockError: there is none of that name.
        """
        if node.bitmaps.pop(name, None) is None:
            raise BlockError(f"{node.describe()} has no bitmap {name!r}")
        async with drained(node):
            node.relink()

    # --- changing -----------------------------------------------------------------------------------------

    async def replace(self, edge: Child, node: Node) -> None:
        """Let an edge lead to another node, while its user goes on using it.

        Raises:
            PermissionConflict, BlockError: it can't be; nothing has changed.
        """
        if isinstance(edge.parent, Node) and edge.parent in downwards([node]):
            raise BlockError(f"{node.describe()} lies on {edge.parent.describe()}: that would make a loop")
        before = edge.node
        async with drained(before), drained(node):
            before.parents.remove(edge)
            node.parents.append(edge)
            edge.node = node
            try:
                self.update_permissions([before, node])
            except BaseException:
                node.parents.remove(edge)
                before.parents.append(edge)
                edge.node = before
                # What the drivers were told to go back to was still without this edge.
                self.update_permissions([before, node])
                raise
            join_sections(node, edge.parent.users())
            edge.bind()
            edge.parent.below_changed(edge)
            if node.size != before.size:
                edge.parent.below_resized(edge)


def own_child_names(tree: Mapping[str, Any], kind: type[Driver], path: str) -> Mapping[str, Any]:
    """The same options, with children that go by another name (`Driver.child_aliases`) under their own.

    Raises:
        OptionError: a child is given under both names.
    """
    for alias, child in kind.child_aliases.items():
        if alias not in tree:
            continue
        if child in tree:
            raise OptionError(f"{path}{alias}: driver {kind.name!r} has this node under the name {child!r} already")
        tree = {child if key == alias else key: value for key, value in tree.items()}
    return tree


def field_names(kind: type[msgspec.Struct]) -> list[str]:
    """The names of a struct's options, as they are written."""
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def given_names(plan: Plan) -> Iterator[str]:
    """The names that a plan gives to new nodes."""
    if plan.options.node_name:
        yield plan.options.node_name
    for child in plan.children.values():
        if isinstance(child, Plan):
            yield from given_names(child)


__all__ = ["Graph", "Limits", "Plan", "drained"]

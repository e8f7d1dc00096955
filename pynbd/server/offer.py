"""`Offer`: what one client is shown of a server's exports. What it may not use is to it as if it were not there."""

from collections.abc import Callable, Mapping

from nbd_protocol.negotiation import ExportInfo
from pynbd.server.export import Export
from pynbd.server.visitor import Visitor

SOMEBODY = Visitor("somebody")


class Offer:
    """The exports, as one client sees them.

    Args:
        exports: by name, as they are when the client asks.
        visitor: who it is, as far as it is known when it asks.
        tell: logs what was refused, and why.
        named: told the name that TLS has proved; it may refuse the client.
    """

    def __init__(
        self,
        exports: Mapping[str, Export],
        visitor: Visitor = SOMEBODY,
        tell: Callable[[str], None] = lambda _: None,
        named: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._exports = exports
        self._visitor = visitor
        self._tell = tell
        self._named = named
        self._refused: set[str] = set()

    def proved(self, name: str) -> None:
        """TLS has told who the client is.

        Raises:
            Refused: it is sent away.
        """
        if name:
            self._visitor.name = name
            self._named(name)

    def find(self, name: str) -> Export | None:
        """The export of a name; None if there is none for this client."""
        if name not in self._exports:
            self._tell_once(name, "there is no such export")
            return None
        export = self._exports[name]
        decision = export.access.decide(self._visitor)
        if decision.policy == "deny":
            self._tell_once(name, f"hidden from it by {decision.why}")
            return None
        return export

    def shown(self) -> list[Export]:
        """All that the client may use."""
        return [export for export in self._exports.values() if export.access.decide(self._visitor).policy != "deny"]

    def info(self, export: Export) -> ExportInfo:
        """What the client is told of an export that it may use."""
        return export.info(read_only=export.access.decide(self._visitor).policy == "read-only")

    def _tell_once(self, name: str, why: str) -> None:
        if name not in self._refused:
            self._refused.add(name)
            self._tell(f"refused: export {name!r}: {why}")

"""`SpanReads`: the reads of a connection that are sent straight from a file's pages."""

import os
from collections.abc import Callable

from nbd_protocol.constants import CommandFlag
from nbd_protocol.transmission import Request
from pynbd.block.statistics import Operation
from pynbd.server.buffers import Buffer
from pynbd.server.execution import Execution
from pynbd.server.spans import FileSpan, SpanFile, has_hole, span_file
from pynbd.server.warm_regions import WarmRegions
from pynbd.server.wire import Item
from pynbd.storage import linux


class SpanReads:
    """The reads of one connection that can be answered so.

    Args:
        execution: knows what is read, and frames the replies.
        warm: what is known of the files.
        warn: logs what went wrong.
        ended: called when the bytes of a read have left, with their number.
    """

    def __init__(
        self,
        execution: Execution,
        warm: WarmRegions,
        warn: Callable[[str], None],
        ended: Callable[[int], None],
    ) -> None:
        self.export = execution.export
        self.backend = execution.backend
        self._warm = warm
        self._warn = warn
        self._execution = execution
        self._ended = ended
        self._file: SpanFile | None = None

    def answer(self, request: Request) -> list[Item] | None:
        """The reply to a read, if its bytes never move and are in the page cache; None if not."""
        offset, length = request.offset, request.length
        located = self.backend.locate(offset, length)
        if located is None or located[2] != length or not self.export.located_for_good():
            return None
        if request.flags & CommandFlag.DF:
            return None
        try:
            # Files in memory (whose reads need no flag against waiting) are there always, also their holes.
            in_memory = not located[3]
            is_warm = not in_memory and self._warm.hold(located[0], located[1], length)
            if not (is_warm or in_memory or linux.readable_at_once(located[0], located[1], length)):
                return None
            status = os.fstat(located[0])
            if not is_warm and has_hole(located[0], located[1], length, status, in_memory=in_memory):
                return None
            file = self._file = span_file(self._file, located[0], status)
        except OSError as problem:
            self._warn(f"can't send from the page cache, so it is copied: {problem}")
            return None

        def finish(problem: OSError | None) -> Buffer:
            self._ended(length)
            if problem is None:
                self.backend.statistics.account(Operation.READ, 1, length, 0)
            return self._execution.span_end(request, problem)

        return [self._execution.span_header(request, offset, length), FileSpan(file, located[1], length, finish)]

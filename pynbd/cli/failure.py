"""How a command that talks to disks ends when something is wrong: one line that says what and where, and status 1."""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any

SIGNALLED = 128
"""The exit status of a command that was ended by a signal, less the signal's number, as shells have it."""


def told(problem: BaseException) -> str:
    """What is wrong, in one line, without Python's words around it."""
    text = str(problem)
    if isinstance(problem, OSError) and problem.strerror:
        text = problem.strerror
        if problem.filename is not None:
            text = f"{os.fsdecode(problem.filename)}: {text}"
    return " ".join(text.split()) or type(problem).__name__


def unexpected(problem: Exception) -> str:
    """What went wrong in a way that nobody foresaw, in one line: mostly in the driver of a third party."""
    frame = problem.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})" if frame is not None else ""
    return f"{type(problem).__name__}: {told(problem)}{where}"


def complete(verb: str, work: Coroutine[Any, Any, int], *, failed: int = 1) -> int:
    """Run a command's coroutine to its end and give the exit status; a failure is told on stderr.

    Args:
        verb: the command's name: `info`.
        work: what it does; its result is the exit status.
        failed: the exit status after a failure.
    """
    from pynbd.block.errors import BlockError
    from pynbd.cli.interruption import Interrupted

    # What is logged on the way to a failure would be more than the one line.
    logging.getLogger("pynbd").addHandler(logging.NullHandler())
    try:
        return asyncio.run(work)
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, BlockError) as problem:
        print(f"pynbd {verb}: {told(problem)}", file=sys.stderr)
        return failed
    except Interrupted as end:
        if str(end):
            print(f"pynbd {verb}: {told(end)}", file=sys.stderr)
        return SIGNALLED + end.number
    except (KeyboardInterrupt, asyncio.CancelledError):
        return SIGNALLED + signal.SIGINT

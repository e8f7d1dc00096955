"""Who copies one disk to another."""

import asyncio

from pynbd.cli.copier import Turns


async def test_a_turn_that_ends_when_all_have_ended() -> None:
    """In the same turn of the event loop: whoever waits is told once, that it never comes."""
    turns = Turns()
    waiting = asyncio.ensure_future(turns.come(1))
    await asyncio.sleep(0)
    turns.end()
    turns.over(0)
    assert not await waiting

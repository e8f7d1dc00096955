"""`nofilter`: a filter that changes nothing.

It overrides nothing, so the block layer leaves it out of the way of every request: reads, writes and flushes to it
go straight to its child. That makes it the proof, and the measure, of what a filter costs.

Limits: none.
"""

from pynbd.block.driver import Filter


class NoFilter(Filter):
    """Pass everything to the child `file`, unchanged and at no cost."""

    name = "nofilter"
    several_processes = "always"

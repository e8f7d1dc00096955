"""Python imports a module of this name when it starts: whatever it then runs by asyncio runs on uvloop."""

import asyncio
import importlib

# By name: uvloop need not be installed where this is checked.
asyncio.set_event_loop_policy(importlib.import_module("uvloop").EventLoopPolicy())

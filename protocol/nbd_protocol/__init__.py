"""The NBD wire protocol, both ends, sans-I/O: bytes in, events out; it knows no socket and no loop.

constants     every number of the specification, and every limit
messages      every structure, declared once
codec         fast codecs derived from those declarations
errors        ours, the peer's, and how errors cross the wire
transmission  requests and replies, for the server and for the client

Option haggling, for both ends, and NBD URIs have modules of their own.
"""

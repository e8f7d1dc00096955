"""Every line of the list of what servers get wrong, held against the running server through real sockets.

The numbers in the names are those of the list: negotiation 1 to 12, transmission 13 to 23. Number 24 is about
clients that talk to a lying server: tests/protocol and tests/storage hold it. What needs TLS is held against the
state machine in tests/protocol, for this server has none; that it never asks for TLS is held here.
"""

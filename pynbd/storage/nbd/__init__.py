"""The driver `nbd`: a disk that a server somewhere serves over NBD.

address.py      where the server is: options, URIs, `nbd:HOST:PORT`, and a connected socket
handshake.py    the negotiation on one socket
connection.py   one socket in the transmission phase: many requests in flight
durability.py   which answered writes a lost server may have lost with it
link.py         a connection that is made again when it is lost
driver.py       the driver
"""

from pynbd.storage.nbd.driver import Nbd

__all__ = ["Nbd"]

"""`python -m pynbd`: the same as the command `pynbd`."""

import sys

from pynbd.cli import command

if __name__ == "__main__":
    sys.exit(command())

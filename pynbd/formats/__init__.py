"""How bytes are laid out: drivers that show a disk which is stored in some form over another node."""

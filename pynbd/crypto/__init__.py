"""Encryption: of disks (secrets, ciphers for sectors, the LUKS container), and of connections (TLS)."""

"""Encryption of disks: secrets, ciphers for sectors, and the LUKS container."""

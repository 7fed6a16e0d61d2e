"""Doors to the kernel and the file system; every wait has a deadline."""

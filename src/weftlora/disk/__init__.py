"""Folders that weftlora writes: whole files or none, whose they are, one process at a time."""

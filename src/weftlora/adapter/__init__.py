"""What an adapter is: its config, what goes together, and the equation of one adapted module."""

from collections.abc import Callable

before_configs: list[Callable[[], None]] = []
"""Called before a config is made, copied or unpickled; the host's room puts in what tells peft of the type."""

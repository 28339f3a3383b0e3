"""Ports for launches, of which several may run at once."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to whoever asks for any:
    one of these could be another process' by the time a launcher takes it."""
    choices = random.SystemRandom()  # tests seed the usual one, alike in all processes
    while True:
        port = choices.randrange(20_000, 32_768)
        with socket.socket() as found:
            try:
                found.bind(("", port))
            except OSError:
                continue
            return port

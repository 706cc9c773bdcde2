"""Unit tests reach no network: connecting an internet socket is an error."""

from __future__ import annotations

import socket

import pytest


class NetworkBlockedError(RuntimeError):
    """A unit test tried to open a network connection."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse internet connections; sockets of the Unix family stay usable."""
    connect = socket.socket.connect

    def connect_locally(self: socket.socket, address: str) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise NetworkBlockedError(f"a unit test tried to connect to {address!r}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_locally)

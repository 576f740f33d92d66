"""Laws of ports on loopback."""

import socket
from pathlib import Path

import pytest

from tasks.running import loopback


def test_a_free_port_is_none_that_an_outgoing_connection_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = loopback.free_ports(20)
    assert len(set(ports)) == 20 and not any(low <= port <= high for port in ports)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", ports[0]))
        holder.listen()
        monkeypatch.setattr(loopback, "PORTS", ports)
        assert set(loopback.free_ports(20)) == set(ports[1:])

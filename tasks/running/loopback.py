"""Servers on loopback ports of this machine: which ports are free, and whether one answers."""

import secrets
import socket
import urllib.error
import urllib.request
from itertools import islice

ANSWER_SECONDS = 20.0  # MLflow's first answer waits for the tables of its database
PORTS = range(10_000, 30_000)


def answers(url: str) -> bool:
    """Whether an HTTP server answers at `url`, with any status but its own failure."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=ANSWER_SECONDS):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return error.code < 500
    except OSError:
        return False


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_ports(count: int) -> list[int]:
    """Free ports below the ephemeral range: no outgoing connection takes one between choosing and binding."""
    shuffled = secrets.SystemRandom().sample(PORTS, len(PORTS))
    return list(islice(filter(is_free, shuffled), count))

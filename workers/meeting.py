"""Where the ranks of a run on several hosts meet: this host's address, and the socket that node 0 opens there for its first rank.

The port is open before anybody hears of it and is handed to the rank itself, so that nobody can take it in between; it listens at that
address alone.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

import psutil

from moelab.connection import find_server

_ELSEWHERE = ("192.0.2.1", 9)  # an address for documentation: nothing is sent there, but the kernel says by which way it would be


def own_address() -> str:
    """MOELAB_ADDRESS, a name resolved; else the address from which this host reaches the server or, where that is loopback, other networks."""
    given = os.environ.get("MOELAB_ADDRESS")
    if given:
        return str(socket.getaddrinfo(given, None)[0][4][0])
    server = urlsplit(find_server().server)
    towards_server = _source((server.hostname or "127.0.0.1", server.port or 80))
    loopback = towards_server is None or towards_server.startswith("127.") or towards_server == "::1"
    return (_source(_ELSEWHERE) if loopback else None) or towards_server or "127.0.0.1"


def _source(target: tuple[str, int]) -> str | None:
    """The address of ours from which packets to `target` would go; None where there is no way."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(*target, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The network interface that has `address`, for gloo and NCCL; None where no interface says so."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address.partition("%")[0] == address.partition("%")[0] for known in addresses):
            return name
    return None


class NoMeeting(Exception):  # noqa: N818 - says what there is not
    """This host cannot be where ranks meet; another may be."""


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of `nodes` hosts meet: `place` is `address:port`, and node 0 holds the `listener` there."""

    nodes: int
    place: str
    listener: socket.socket | None = None

    @classmethod
    def called(cls, nodes: int) -> Meeting:
        """One at this host's own address, at MOELAB_RENDEZVOUS_PORT if that is set. Raises NoMeeting."""
        port = os.environ.get("MOELAB_RENDEZVOUS_PORT", "0")
        listener = None
        try:
            address = own_address()
            if ":" in address and ip_address(address).is_link_local:
                raise ValueError(f"{address} is good on one link, for which each host has a name of its own: others cannot use it")
            listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, int(port)))
            listener.listen(4096)
        except (OSError, ValueError, OverflowError) as error:
            if listener is not None:
                listener.close()
            given = os.environ.get("MOELAB_ADDRESS", "")
            raise NoMeeting(f"ranks of other hosts cannot come here (MOELAB_ADDRESS {given!r}, MOELAB_RENDEZVOUS_PORT {port!r}): {error}") from error
        bound = listener.getsockname()[1]
        return cls(nodes, f"[{address}]:{bound}" if ":" in address else f"{address}:{bound}", listener)

    @property
    def fds(self) -> list[int]:
        """What the first rank inherits."""
        return [] if self.listener is None else [self.listener.fileno()]

    def environment(self) -> dict[str, str]:
        """What a rank needs to come here, and to talk over the interface by which this host is known."""
        found = {"MOELAB_RENDEZVOUS": f"tcp://{self.place}"}
        if self.listener is not None:
            found["MOELAB_RENDEZVOUS_FD"] = str(self.listener.fileno())
        interface = interface_of(own_address())
        if interface:
            found |= {name: interface for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if name not in os.environ}
        return found

    def close(self) -> None:
        """The ranks have what they need."""
        if self.listener is not None:
            self.listener.close()

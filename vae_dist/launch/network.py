"""Which network interface a worker's collectives use: the one that bears its Ray node's address.

Without being told, gloo listens where the host's own name points to, on many systems 127.0.0.1, and workers of two
hosts cannot connect.
"""

from __future__ import annotations

import os

import psutil  # type: ignore[import-untyped]
import ray

from vae_dist.errors import MachineError


def use_node_interface() -> None:
    """Set `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME` in this process, unless its node was started with them."""
    name = interface_of(ray.util.get_node_ip_address())
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    # With = NCCL takes the very name; without it eth1 means eth10, too.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


def interface_of(address: str) -> str:
    """The interface of this host that bears an IP address.

    Raises:
        MachineError: none does.
    """
    interfaces = psutil.net_if_addrs()
    # All of 127.0.0.0/8 is loopback, such as the 127.0.1.1 that Debian gives the host's name.
    wanted = "127.0.0.1" if address.startswith("127.") else address
    for name, addresses in interfaces.items():
        # A link-local IPv6 address ends with %interface.
        if wanted in {one.address.partition("%")[0] for one in addresses}:
            return str(name)
    raise MachineError(
        f"No network interface of this host bears {address}, the address of its Ray node (there are "
        f"{', '.join(interfaces)}). Start the node with --node-ip-address and an address of its own, or with "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME set."
    )

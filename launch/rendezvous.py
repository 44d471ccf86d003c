"""The environment in which the processes of a step of `srun` find each other. This module does not import torch."""

from __future__ import annotations

import os
import random
import socket

from launch import slurm_client


def environment(first: str) -> dict[str, str]:
    """This process's environment, in which processes on other nodes meet on the node `first`."""
    port = random.randrange(20000, 32000)  # below the ports that operating systems assign to clients
    return {**os.environ, "MASTER_ADDR": _address(first), "MASTER_PORT": str(port)}


def _address(node: str) -> str:
    """The address of a node for the other nodes: its name if that can be resolved, otherwise its address in Slurm."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        words = slurm_client.ask("scontrol", "--oneliner", "show", "node", node).split()
        return next((word.partition("=")[2] for word in words if word.startswith("NodeAddr=")), node)

"""Joins the processes of a replica: the ranks that hold one sharded model together.

Who started a rank has told it its place in the environment, as `torchrun` does: RANK and WORLD_SIZE, MASTER_ADDR and
MASTER_PORT of rank 0, and LOCAL_RANK, its device among those that it sees. Who holds rank 0's port hands it the listening
socket as MASTER_LISTEN_FD, a descriptor; otherwise rank 0 opens the port now, and another program may have taken it meanwhile.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from ipaddress import ip_address

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

TIMEOUT = timedelta(minutes=10)
"""After so long a rank gives up waiting for another. Longer than one may be behind the other: reading text encoders from a slow
disk, storing the stream of one block. A rank that dies is noticed by who started it, long before."""
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_LISTENING = "MASTER_LISTEN_FD"


def join_process_group(device: torch.device) -> torch.device:
    """Joins once per process, over NCCL on GPUs and gloo on CPUs; returns the rank's own device.

    Raises:
        RuntimeError: nobody has told this process its place.
    """
    missing = [name for name in _PLACE if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"a sharded model needs ranks, and {', '.join(missing)} is not set: start this process with torchrun, or let a "
            "pool with gpus_per_replica above 1 start it"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _stay_on_loopback(os.environ["MASTER_ADDR"])
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=_store(rank, world_size),
            rank=rank,
            world_size=world_size,
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    return device


def _store(rank: int, world_size: int) -> TCPStore:
    """Rank 0's, which listens on MASTER_ADDR alone: by itself a store listens on every interface."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listening = _listening_socket(address, port).detach() if rank == 0 else None
    return TCPStore(address, port, world_size, rank == 0, timeout=TIMEOUT, master_listen_fd=listening)


def _listening_socket(address: str, port: int) -> socket.socket:
    descriptor = os.environ.pop(_LISTENING, None)  # it is the store's from now on
    if descriptor is not None:
        return socket.socket(fileno=int(descriptor))
    return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def _stay_on_loopback(address: str) -> None:
    """Where rank 0 is reached over the loopback device, all ranks are on one machine and need no other."""
    try:
        local = ip_address(address).is_loopback
    except ValueError:
        local = address == "localhost"
    if local:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")

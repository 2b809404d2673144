"""Join a Ray cluster, or start one on this machine, and count the trials that fit on it."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from orchestration.errors import ClusterError
from orchestration.plan.spec import Resources
from orchestration.run.ray_private import living_nodes, withhold_credentials

log = logging.getLogger(__name__)

NODES_WITHIN_S = 60.0
"""How long a sweep waits for the first worker node of a cluster."""


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Join the Ray cluster at `address` (`host:port` or `auto`), or start a local one where it is None.

    Raises:
        ClusterError: the cluster does not answer.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    _probe(address)
    withhold_credentials()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its tracebacks repeat what an event says in one line
    try:
        if address is None:
            # "local": without an address Ray would join any cluster that runs on this machine
            ray.init(address="local", include_dashboard=False, object_store_memory=2**27, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterError(f"Ray at {address or 'this machine'} cannot be reached: {error}; check RAY_ADDRESS and the token") from error
    try:
        yield
    finally:
        ray.shutdown()


def slots(resources: Resources) -> int:
    """How many trials fit on the cluster at once. If it has only a head node so far, wait up to NODES_WITHIN_S for a worker node.

    Raises:
        ClusterError: no node can ever hold a trial.
    """
    nodes, since_s = living_nodes(), time.monotonic()
    if not _offers_work(nodes):
        log.warning("no worker node has joined the cluster yet; waiting up to %g s for one", NODES_WITHIN_S)
    while not _offers_work(nodes) and time.monotonic() - since_s < NODES_WITHIN_S:
        time.sleep(1)
        nodes = living_nodes()
    per_node = [_fits(node, resources) for node in nodes]
    if not sum(per_node):
        largest = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)), default={})
        raise ClusterError(
            f"no node can hold a trial: resources ask for cpu {resources.cpu:g}, gpu {resources.gpu:g}; "
            f"the largest of {len(nodes)} nodes has cpu {largest.get('CPU', 0):g}, gpu {largest.get('GPU', 0):g}; "
            "lower resources in the sweep file or join a larger cluster with RAY_ADDRESS"
        )
    return sum(per_node)


def _probe(address: str | None) -> None:
    """Fail within seconds where nothing listens; Ray itself would retry for minutes."""
    if address is None or address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ClusterError(f"RAY_ADDRESS: must be host:port of a cluster's head or auto, got {address}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ClusterError(f"RAY_ADDRESS: nothing answers at {address}: {error}") from error


def _offers_work(nodes: list[dict[str, float]]) -> bool:
    return any(node.get("CPU", 0) for node in nodes)


def _fits(node: dict[str, float], resources: Resources) -> int:
    """Trials that fit on one node; the small slack allows for fractions such as 3 x 1/3."""
    asked = {"CPU": resources.cpu, "GPU": resources.gpu}
    return min(int(node.get(name, 0) / amount + 1e-6) for name, amount in asked.items() if amount)

"""Join a Ray cluster, or start one on this machine, and count the trials that fit on it."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from orchestration.errors import ClusterError
from orchestration.formatting import bytes_shown
from orchestration.plan.spec import Resources
from orchestration.preflight.machine import free_memory, granted_cpus
from orchestration.run import ray_probe
from orchestration.run.ray_private import LONGEST_FOLDER, fault_in, first_sentence, living_nodes, private_cluster, withhold_credentials

log = logging.getLogger(__name__)

NODES_WITHIN_S = 60.0
"""How long a sweep waits for the first worker node of a cluster."""

PROBE_WITHIN_S = 30.0
"""How long a cluster may take to say who it is."""

OBJECT_STORE_BYTES = 2**27

LONGEST_TMPDIR = 70
"""Bytes. Programs bind Unix sockets below TMPDIR, with names of up to 35 bytes; loader processes do."""

_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Join the Ray cluster at `address` (`host:port` or `auto`), or start a local one where it is None.

    A local one gets the CPUs and the memory that this process may use, a folder that only its user can enter, and a token of its own.

    Raises:
        ClusterError: Ray cannot start here, or the cluster cannot be joined.
    """
    withhold_credentials()
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # its tracebacks repeat what an event says in one line
    with _own_cluster(os.environ) if address is None else _joined(address):
        yield


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
            f"no node can hold a trial: resources ask for {_shown(asked(resources))}; "
            f"the largest of {len(nodes)} nodes has {_shown({name: largest.get(name, 0) for name in asked(resources)})}; "
            "lower resources in the sweep file or join a larger cluster with RAY_ADDRESS"
        )
    return sum(per_node)


def asked(resources: Resources) -> dict[str, float]:
    """What a trial reserves, by Ray's names of resources."""
    memory = {"memory": int(resources.memory * 2**30)} if isinstance(resources.memory, float | int) else {}
    return {"CPU": resources.cpu, "GPU": resources.gpu, **memory}


@contextmanager
def _own_cluster(environment: Mapping[str, str]) -> Iterator[None]:
    folder = _folder(environment)
    with private_cluster(_short_tmpdir(environment, folder)):
        try:
            # "local": without an address Ray would join any cluster that runs on this machine
            ray.init(
                address="local",
                num_cpus=granted_cpus(environment),
                num_gpus=_visible_gpus(environment),
                _memory=max(0, free_memory() - OBJECT_STORE_BYTES),
                _temp_dir=str(folder / "r"),  # which Ray opens to every user
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                **_QUIET,
            )
        except Exception as error:  # Ray raises bare exceptions too
            text = f"Ray does not start on this machine: {first_sentence(error)}; its logs are in {folder}/r/session_latest/logs"
            raise ClusterError(text) from error
        try:
            yield
        finally:
            ray.shutdown()


@contextmanager
def _joined(address: str) -> Iterator[None]:
    _probe(address)
    try:
        ray.init(address=address, **_QUIET)
    except Exception as error:
        raise ClusterError(f"RAY_ADDRESS: the cluster at {address} cannot be joined: {first_sentence(error)}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Fail within seconds where no cluster can be joined; Ray itself would retry for minutes, or end this process."""
    host, _, port = address.rpartition(":")
    if address != "auto" and ("://" in address or not host or not port.isdecimal()):
        raise ClusterError(f"RAY_ADDRESS: must be host:port of a cluster's head or auto, got {address}")
    command = [sys.executable, "-P", str(ray_probe.__file__), address]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PROBE_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        text = f"RAY_ADDRESS: what listens at {address} does not answer as a Ray cluster within {PROBE_WITHIN_S:g} s"
        raise ClusterError(f"{text}; restart the cluster, or correct RAY_ADDRESS") from None
    if fault := fault_in(answer.stdout):
        raise ClusterError(f"RAY_ADDRESS: {fault}")


def _folder(environment: Mapping[str, str]) -> Path:
    """Ray's folder of this user. Its path is short enough for Unix sockets, and no other user can enter it."""
    named = [environment.get(name, "") for name in ("RAY_TMPDIR", "TMPDIR")]
    refused = []
    for base in dict.fromkeys([*filter(None, named), "/tmp", "/var/tmp", environment.get("XDG_RUNTIME_DIR") or "/tmp", "/dev/shm"]):
        folder = Path(base).absolute() / f"ray-{os.getuid()}"
        if reason := _unusable(folder):
            refused.append(f"{folder} ({reason})")
        else:
            return folder
    text = f"Ray needs a folder for its sockets, and none of these will do: {', '.join(refused)}"
    raise ClusterError(f"{text}; set RAY_TMPDIR to a folder that you can write, with a path of at most {LONGEST_FOLDER - 12} bytes")


def _unusable(folder: Path) -> str | None:
    """Why Ray cannot use the folder, which is created if need be."""
    if len(os.fsencode(folder)) > LONGEST_FOLDER:
        return f"longer than {LONGEST_FOLDER} bytes"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return "belongs to another user"
        folder.chmod(0o700)
        (folder / f"try-{os.getpid()}").touch()
        (folder / f"try-{os.getpid()}").unlink()
    except OSError as error:
        return str(error.strerror)
    return None


def _short_tmpdir(environment: Mapping[str, str], folder: Path) -> str | None:
    """A short name for a TMPDIR that is too long for the sockets of loader processes: a symbolic link in Ray's folder."""
    long = environment.get("TMPDIR", "")
    if len(os.fsencode(long)) <= LONGEST_TMPDIR:
        return None
    link = folder / f"tmp-{os.getpid()}"
    with suppress(FileNotFoundError):
        link.unlink()
    link.symlink_to(long)
    return str(link)


def _visible_gpus(environment: Mapping[str, str]) -> int | None:
    """Of the GPUs that CUDA_VISIBLE_DEVICES names those that exist; Ray would count all names."""
    if not environment.get("CUDA_VISIBLE_DEVICES"):
        return None
    import torch

    return torch.cuda.device_count()


def _offers_work(nodes: list[dict[str, float]]) -> bool:
    return any(node.get("CPU", 0) for node in nodes)


def _fits(node: dict[str, float], resources: Resources) -> int:
    """Trials that fit on one node; the small slack allows for fractions such as 3 x 1/3."""
    return min(int(node.get(name, 0) / amount + 1e-6) for name, amount in asked(resources).items() if amount)


def _shown(amounts: Mapping[str, float]) -> str:
    return ", ".join(f"{name.lower()} {bytes_shown(amount) if name == 'memory' else f'{amount:g}'}" for name, amount in amounts.items())

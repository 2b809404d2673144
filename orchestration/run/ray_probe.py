"""Ask a Ray cluster who it is, as a program of its own (`python -P ray_probe.py ADDRESS`): Ray may hang, or end the process that asks.

It prints one line of JSON: `{}` if a driver can join, else `{"error": TEXT}`.
"""

from __future__ import annotations

import json
import socket
import sys
import time

from ray._common.usage.usage_lib import get_cluster_metadata
from ray._common.utils import get_ray_address_file
from ray._private import services
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.utils import check_version_info, compute_version_info
from ray._raylet import GcsClient  # type: ignore[attr-defined]

CONNECT_WITHIN_S = 8.0
NODE_WITHIN_S = 8.0


class JoinError(Exception):
    """Why a driver cannot join, and what to do."""


def probe(address: str) -> None:
    """Raises JoinError, or what Ray raises: the cluster does not answer, refuses the token, or differs in its versions."""
    found = _found() if address == "auto" else address
    _require_listener(found, named_by_file=address == "auto")
    metadata = get_cluster_metadata(GcsClient(address=services.canonicalize_bootstrap_address(found)))
    try:
        check_version_info(metadata, "this machine")
    except RuntimeError:
        theirs, ours = (metadata["ray_version"], metadata["python_version"]), compute_version_info()  # type: ignore[no-untyped-call]
        text = f"the cluster at {found} has Ray {theirs[0]} and Python {theirs[1]}, this driver has Ray {ours[0]} and Python {ours[1]}"
        raise JoinError(f"{text}; install the same versions on both") from None
    _require_node(found)


def _found() -> str:
    """The address that `ray.init` would find for `auto`."""
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        return str(services.get_ray_address_from_environment("auto", None))
    except ConnectionError:
        raise JoinError("no cluster runs on this machine; start a node with `ray start`, or unset RAY_ADDRESS") from None


def _require_listener(address: str, *, named_by_file: bool) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_WITHIN_S).close()
    except OSError as error:
        file = get_ray_address_file(None)
        advice = f"remove {file}, which names this cluster" if named_by_file else "start it, correct RAY_ADDRESS, or unset it"
        raise JoinError(f"nothing answers at {address}: {error}; {advice}") from error


def _require_node(address: str) -> None:
    """A driver joins through a node on its own machine, which may have just been started."""
    deadline_s = time.monotonic() + NODE_WITHIN_S
    while not services.find_node_ids():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline_s:
            raise JoinError(f"no node of the cluster runs on this machine; start one: ray start --address={address} --num-cpus=0")
        time.sleep(0.5)


if __name__ == "__main__":
    try:
        probe(sys.argv[1])
        answer = {}
    except Exception as error:
        answer = {"error": " ".join(str(error).split())}
    sys.stdout.write(json.dumps(answer))

"""Machines on one switch, as Linux network namespaces: nothing of them leaves this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest


@dataclass(frozen=True, slots=True)
class Machine:
    """One namespace with an address of its own on the switch."""

    namespace: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        """What starts a command there."""
        return ("ip", "netns", "exec", self.namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


def missing() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need ip(8), Debian's iproute2"
    trial = f"plx-{secrets.token_hex(3)}"
    try:
        _ip("netns", "add", trial)
        _ip("netns", "del", trial)
    except subprocess.CalledProcessError as error:
        return f"this machine does not let us make network namespaces: {error.stderr.strip()}"
    return None


def cannot_shape() -> str | None:
    """Why links cannot be made slow here; None if they can."""
    if shutil.which("tc") is None:
        return "slow links need tc(8), Debian's iproute2"
    trial = f"plx-{secrets.token_hex(3)}"
    _ip("netns", "add", trial)
    try:
        subprocess.run(
            ["tc", "-n", trial, "qdisc", "add", "dev", "lo", "root", *shape(256_000, 0.4)],
            check=True,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except subprocess.CalledProcessError as error:
        return f"this machine's kernel shapes no traffic (sch_tbf): {error.stderr.strip()}"
    finally:
        _ip("netns", "del", trial)
    return None


def shape(bits_s: int, queue_s: float) -> tuple[str, ...]:
    """What tells ``tc`` of a link of so many bits, behind a queue that holds so many seconds."""
    return ("tbf", "rate", f"{bits_s}bit", "burst", "4kb", "latency", f"{queue_s}s")


def require(*, slow: bool = False) -> None:
    """Skips where there can be no namespaces, or no ``slow`` links; in CI that is a failure."""
    reason = missing() or (cannot_shape() if slow else None)
    if reason is None:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI has to run this test: {reason}")
    pytest.skip(reason)


@contextlib.contextmanager
def network(machines: int) -> Iterator[list[Machine]]:
    """Namespaces around a bridge in a namespace of its own; all gone afterwards, come what may.

    Each has ``eth0`` with 10.77.0.N/24 and no route beyond it.
    """
    run = f"plx-{os.getpid()}-{secrets.token_hex(3)}"
    switch = f"{run}-switch"
    made: list[str] = []
    try:
        _ip("netns", "add", switch)
        made.append(switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        found = []
        for number in range(1, machines + 1):
            machine = Machine(f"{run}-{number}", f"10.77.0.{number}")
            _ip("netns", "add", machine.namespace)
            made.append(machine.namespace)
            port = f"port{number}"
            _ip(
                *("-n", switch, "link", "add", port, "type", "veth"),
                *("peer", "name", "eth0", "netns", machine.namespace),
            )
            _ip("-n", switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", machine.namespace, "link", "set", "lo", "up")
            _ip("-n", machine.namespace, "link", "set", "eth0", "up")
            _ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            found.append(machine)
        yield found
    finally:
        for namespace in reversed(made):
            # The veth pairs and the bridge go with their namespaces.
            subprocess.run(
                ["ip", "netns", "del", namespace], check=False, capture_output=True, timeout=20
            )

"""The single checks of ``parallax doctor``."""

from __future__ import annotations

import asyncio
import errno
import json
import platform
import resource
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from urllib.error import URLError
from urllib.request import HTTPSHandler, ProxyHandler, build_opener

from parallax.cli.client import tls_context
from parallax.cli.tables import size
from parallax.fabric.addresses import Kind, host_port, listening_addresses
from parallax.fabric.discovery import advertise, find_scheduler, find_schedulers
from parallax.fabric.errors import BadSetting, ParallaxError
from parallax.fabric.hosts import ANYWHERE
from parallax.fabric.identity import load_identity, peer_id_of
from parallax.fabric.settings import SchedulerSettings, config_file
from parallax.fabric.version import VERSION, mlx_lm_version, mlx_version

LOOK_AROUND_S = 2.0
HEALTH_S = 2.0
LITTLE_MEMORY_BYTES = 4 * 10**9
LITTLE_DISK_BYTES = 10 * 10**9
FEW_FILES = 1024
PYTHONS = ((3, 11), (3, 13))


class Grade(Enum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report."""

    name: str
    grade: Grade
    detail: str
    advice: str = ""


def all_checks(settings: SchedulerSettings) -> Iterator[Check]:
    """Every check, one after the other; a check that itself fails says so."""
    checks: list[tuple[str, Callable[[SchedulerSettings], Iterator[Check]]]] = [
        ("versions", versions),
        ("settings", settings_file),
        ("state", state_folder),
        ("ports", ports),
        ("interfaces", interfaces),
        ("mDNS", mdns),
        ("memory", memory),
        ("files", open_files),
    ]
    for name, check in checks:
        try:
            yield from check(settings)
        except ParallaxError as error:
            yield Check(
                name, Grade.FAIL, " ".join(filter(None, (error.what, error.why))), error.fix
            )
        except Exception as error:
            yield Check(name, Grade.FAIL, f"{type(error).__name__}: {error}")


def versions(settings: SchedulerSettings) -> Iterator[Check]:
    """Python, Parallax, mlx and mlx-lm."""
    running = sys.version_info[:2]
    low, high = PYTHONS
    yield Check(
        "python",
        Grade.OK if low <= running <= high else Grade.FAIL,
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if low <= running <= high else "Parallax needs Python 3.11, 3.12 or 3.13",
    )
    missing = [
        n for n, v in (("mlx", mlx_version()), ("mlx-lm", mlx_lm_version())) if v == "unknown"
    ]
    yield Check(
        "versions",
        Grade.FAIL if missing else Grade.OK,
        f"parallax {VERSION}, mlx {mlx_version()}, mlx-lm {mlx_lm_version()}",
        f"Install Parallax anew: {' and '.join(missing)} missing" if missing else "",
    )


def settings_file(settings: SchedulerSettings) -> Iterator[Check]:
    """Which file the settings come from; a wrong one would have ended us before."""
    path = config_file()
    yield Check("settings", Grade.OK, str(path) if path else "no file, the defaults hold")


def state_folder(settings: SchedulerSettings) -> Iterator[Check]:
    """The state directory can be written and its identity used; there is room for models."""
    folder = settings.state_dir
    path = folder / "identity.key"
    if path.exists():
        yield Check("state", Grade.OK, f"{folder}, identity {load_identity(path).peer_id}")
    else:
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        probe = existing / f".parallax-{secrets.token_hex(4)}"
        try:
            probe.touch(mode=0o600)
            probe.unlink()
        except OSError as error:
            yield Check(
                "state",
                Grade.FAIL,
                f"{folder} cannot be written: {error.strerror}",
                "Give --state-dir a folder that you may write to",
            )
            return
        yield Check("state", Grade.OK, f"{folder}, no identity yet: the first start makes one")
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    little = free < LITTLE_DISK_BYTES
    yield Check(
        "disk",
        Grade.WARN if little else Grade.OK,
        f"{size(free)} free for models",
        "Large models need tens of gigabytes; --state-dir can name another disk" if little else "",
    )


def ports(settings: SchedulerSettings) -> Iterator[Check]:
    """The scheduler's two ports are free, or a Parallax has them already."""
    scheme = "https" if settings.tls_cert else "http"
    try:
        opener = build_opener(
            ProxyHandler({}), HTTPSHandler(context=tls_context(None, settings.tls_cert))
        )
    except BadSetting as error:
        yield Check("TLS certificate", Grade.FAIL, error.what, error.fix)
        opener = build_opener(ProxyHandler({}))

    def is_parallax(host: str, port: int) -> bool:
        url = f"{scheme}://{host_port(ANYWHERE.get(host, host), port)}/health"
        try:
            with opener.open(url, timeout=HEALTH_S) as answer:
                return "ready" in json.loads(answer.read(65536))
        except (URLError, OSError, ValueError, TypeError):
            return False

    yield _port("HTTP port", settings.host, settings.port, "--port", is_parallax)
    yield _port("gRPC port", "127.0.0.1", settings.grpc_port, "--grpc-port", None)


def _port(
    name: str, host: str, port: int, flag: str, is_ours: Callable[[str, int], bool] | None
) -> Check:
    if port == 0:
        return Check(name, Grade.OK, "any free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return Check(name, Grade.FAIL, f"{host_port(host, port)}: {error.strerror}")
        else:
            return Check(name, Grade.OK, f"{port} is free")
    if is_ours is not None and is_ours(host, port):
        return Check(name, Grade.OK, f"{port} is served by a Parallax that runs here")
    return Check(
        name,
        Grade.WARN,
        f"{port} is in use",
        f"If that is no Parallax of yours, choose another with {flag}",
    )


def interfaces(settings: SchedulerSettings) -> Iterator[Check]:
    """Private addresses on which other machines can reach this one."""
    found = [
        a
        for a in listening_addresses(loopback_only=settings.loopback_only)
        if a.kind is not Kind.LOOPBACK
    ]
    if settings.loopback_only:
        yield Check("interfaces", Grade.OK, "loopback only, as asked")
    elif not found:
        yield Check(
            "interfaces",
            Grade.WARN,
            "no private address: other machines cannot reach this one",
            "Connect it to the network that the others are on",
        )
    for kind in dict.fromkeys(a.kind for a in found):
        hosts = ", ".join(f"{a.host} ({a.interface})" for a in found if a.kind is kind)
        yield Check(kind.value, Grade.OK, hosts)


def mdns(settings: SchedulerSettings) -> Iterator[Check]:
    """mDNS works inside this machine, and who answers on the network."""
    try:
        asyncio.run(_advertise_and_find())
    except ParallaxError as error:
        yield Check(
            "mDNS",
            Grade.FAIL,
            f"does not work on this machine: {error.what}",
            "Firewalls must let UDP port 5353 through; nodes can still join with -s host:port",
        )
        return
    yield Check("mDNS", Grade.OK, "advertising and finding work on this machine")
    found = asyncio.run(find_schedulers(LOOK_AROUND_S, loopback_only=settings.loopback_only))
    shown = ", ".join(f"{f.name} ({f.peer_id})" for f in found)
    advice = ""
    if not found and sys.platform == "darwin":
        advice = (
            "If one runs: System Settings > Privacy & Security > Local Network must allow this "
            "terminal; without it connects fail with 'No route to host'"
        )
    yield Check("schedulers", Grade.OK, shown or "none answers on this network now", advice)


async def _advertise_and_find() -> None:
    peer_id = peer_id_of(secrets.token_bytes(32))
    # On loopback alone: nobody else shall see a scheduler that is none.
    async with advertise(peer_id=peer_id, name="doctor", enrol_port=9, loopback_only=True):
        await find_scheduler(peer_id, LOOK_AROUND_S, loopback_only=True)


def memory(settings: SchedulerSettings) -> Iterator[Check]:
    """What a node here could hold, and what it computes on."""
    from parallax.node.facts import measure_facts

    facts = measure_facts("", name="", memory_bytes=None)
    little = facts.budget_bytes < LITTLE_MEMORY_BYTES
    yield Check(
        "memory",
        Grade.WARN if little else Grade.OK,
        f"{size(facts.memory_bytes)}, of which a node would use {size(facts.budget_bytes)}",
        "Close other programs, or serve smaller models" if little else "",
    )
    yield Check(
        "compute",
        Grade.OK,
        f"{facts.chip} ({facts.backend}), reads {size(facts.bandwidth_bytes_s)}/s, "
        f"{facts.flops / 1e9:.0f} GFLOP/s",
        "The limit for the GPU can be raised: sudo sysctl iogpu.wired_limit_mb=MEGABYTES"
        if facts.backend == "metal" and little
        else "",
    )


def open_files(settings: SchedulerSettings) -> Iterator[Check]:
    """How many connections and files a process may have."""
    # A process raises the soft limit to the hard one by itself (``serving.py``).
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = 0 <= hard < FEW_FILES
    yield Check(
        "open files",
        Grade.WARN if few else Grade.OK,
        "no limit" if hard < 0 else f"at most {hard}",
        f"Raise the hard limit, as root: ulimit -Hn {4 * FEW_FILES}" if few else "",
    )

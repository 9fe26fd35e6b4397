"""The cluster's status as the API shows it: the reference's fields, and more."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from parallax.fabric.events import Loading
from parallax.fabric.settings import SchedulerSettings
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.admission_values import Pending, Standing
from parallax.scheduler.http.access import notices
from parallax.scheduler.membership import Member, NodeState
from parallax.scheduler.reconciler import Ring, RingState

if TYPE_CHECKING:
    from parallax.scheduler.cluster import ClusterService

GB = 1 << 30
MOST_ABSENT = 256  # nodes in the status that are not here
OPEN_TO_ALL_NOTICE = (
    "ADMISSION IS OFF (--open): whoever reaches this scheduler becomes a node of it, and nodes see "
    "what is asked and answered."
)


def status_of(cluster: ClusterService) -> dict[str, object]:
    """The ``data`` of a ``cluster_status`` message."""
    chosen = cluster.chosen
    rings = cluster.reconciler.rings
    ready = any(ring.state is RingState.READY for ring in rings)
    usable = cluster.members.usable()
    wanted = chosen.nodes if chosen else cluster.settings.nodes
    short = cluster.missing_bytes is not None
    model: dict[str, object] | None = None
    if chosen is not None:
        model = {
            "name": chosen.folder.name,
            "layers": chosen.facts.layers,
            "context_tokens": chosen.served.context_tokens,
            "weight_bytes": chosen.facts.weight_bytes,
        }
    return {
        "status": "available" if ready else "waiting",
        "model_name": chosen.folder.name if chosen else "",
        "init_nodes_num": wanted,
        "node_join_command": cluster.gate.plain_join_command(),
        "node_list": [_node(cluster, member) for member in cluster.members.members()],
        "pending_nodes": [pending_of(pending) for pending in cluster.gate.pending()],
        "absent_nodes": _absent(cluster),
        "open": cluster.gate.open,
        "need_more_nodes": not ready and (len(usable) < wanted or short),
        "model": model,
        "choosing": cluster.choosing,
        "rings": [_ring(cluster, ring) for ring in rings],
        "queue": {"waiting": cluster.requests.waiting, "running": cluster.requests.running},
        "totals": cluster.totals.told(),
        "missing_bytes": cluster.missing_bytes,
        "problem": cluster.problem.sentence if cluster.problem else None,
        "notice": " ".join(notices_of(cluster.settings)),
    }


def notices_of(settings: SchedulerSettings) -> list[str]:
    """What people should be warned of."""
    found = [OPEN_TO_ALL_NOTICE] if settings.open else []
    return found + notices(settings)


def pending_of(pending: Pending) -> dict[str, object]:
    """A node that waits to be let in."""
    return {
        "node_id": pending.node_id,
        "name": pending.name,
        "address": pending.address,
        "fingerprint": pending.fingerprint,
        "since": pending.since_s,
    }


def _absent(cluster: ClusterService) -> list[dict[str, object]]:
    """Nodes that may come back without being asked, those let in last first."""
    listed = {member.facts.node_id for member in cluster.members.members()}
    away = [
        {"node_id": known.node_id, "name": known.name, "since": known.since_s}
        for known in cluster.gate.known()
        if known.standing is Standing.ADMITTED and known.node_id not in listed
    ]
    return list(reversed(away[-MOST_ABSENT:]))


def _node(cluster: ClusterService, member: Member) -> dict[str, object]:
    facts = member.facts
    gone = member.state is NodeState.GONE
    place = None if gone else cluster.reconciler.place_of(facts.node_id)
    ring = None if gone else _ring_of(cluster, facts.node_id)
    serves = ring is not None and ring.state is RingState.READY
    progress = None if gone else cluster.reconciler.progress_of(facts.node_id)
    return {
        "node_id": facts.node_id,
        "status": "available" if serves else "waiting",
        "gpu_num": facts.accelerators,
        "gpu_name": facts.chip,
        "gpu_memory": round(facts.memory_bytes / GB),
        "name": facts.name,
        "chip": facts.chip,
        "platform": facts.platform,
        "state": cluster.state_of(member),
        "memory_bytes": facts.memory_bytes,
        "budget_bytes": facts.budget_bytes,
        "bandwidth_bytes_s": facts.bandwidth_bytes_s,
        "flops": facts.flops,
        "layers": [place.first, place.end] if place else None,
        "load": _load(progress),
        "aside": None if gone else cluster.aside.told(facts.node_id, time.monotonic()),
    }


def _ring_of(cluster: ClusterService, node_id: str) -> Ring | None:
    return next((r for r in cluster.reconciler.rings if node_id in r.nodes), None)


def _load(progress: wire.LoadProgress | None) -> dict[str, object] | None:
    if progress is None:
        return None
    done, total = progress.done_bytes, progress.total_bytes
    return {
        "done_bytes": done,
        "total_bytes": total,
        "phase": progress.phase,
        "fraction": done / total if total else 0.0,
    }


def _prefixes(load: wire.PrefixLoad) -> dict[str, object]:
    return {
        "kept": load.kept,
        "kept_bytes": load.kept_bytes,
        "prompts": load.prompts,
        "hits": load.hits,
        "saved_tokens": load.saved_tokens,
        "evictions": load.evictions,
    }


def _ring(cluster: ClusterService, ring: Ring) -> dict[str, object]:
    load = cluster.requests.loads.get(ring.epoch)
    return {
        "epoch": ring.epoch,
        "status": "ready" if ring.state is RingState.READY else "forming",
        "stages": [
            {
                "node_id": place.node_id,
                "name": cluster.name_of(place.node_id),
                "layers": [place.first, place.end],
            }
            for place in ring.places
        ],
        "prefix_cache": _prefixes(load.prefixes if load else wire.PrefixLoad()),
        "load": {
            "decoding": load.decoding if load else 0,
            "prefilling": load.prefilling if load else 0,
            "free_rows": load.free_rows if load else 0,
            "lanes": load.lanes if load else 0,
            "charged_bytes": load.charged_bytes if load else 0,
            "drafted_tokens": load.drafted_tokens if load else 0,
            "accepted_tokens": load.accepted_tokens if load else 0,
        },
    }


def loading_of(progress: wire.LoadProgress, name: str) -> Loading:
    """A node's progress as an event."""
    stage = progress.stage
    fraction = progress.done_bytes / progress.total_bytes if progress.total_bytes else 0.0
    layers = f"{stage.model.name} layers {stage.first}-{stage.end - 1}"
    return Loading(f"{layers} on {name}: {progress.phase}", fraction)

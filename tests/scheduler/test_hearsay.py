"""What nodes say of rings, and what of it is believed."""

from __future__ import annotations

from parallax.fabric.errors import MessageRefused
from parallax.proto import wire_pb2 as wire
from parallax.scheduler.cluster import ClusterService
from tests.scheduler.told import Node, serving


async def test_only_those_who_sit_in_a_ring_can_say_of_it(cluster: ClusterService) -> None:
    first, _, epoch = await serving(cluster)
    stranger = Node(cluster, "stranger").attend()
    fault = wire.Fault(kind="LinkBroken", what="Broken")
    stranger.report(broken=wire.RingBroken(epoch=epoch, fault=fault))
    stranger.report(health=wire.StageHealth(epoch=epoch, stage=0, decode_frames=10**9))
    wrong = wire.StageHealth(epoch=epoch, stage=9, decode_frames=10**9)
    first.report(health=wrong)
    assert cluster.reconciler.by_epoch(epoch) is not None
    assert b"stage_frames_total{" not in cluster._metrics.page()
    refused = wire.Fault(kind="FrameRefused", what="Refused")
    first.report(broken=wire.RingBroken(epoch=epoch, fault=refused))
    assert cluster.reconciler.by_epoch(epoch) is None
    assert b'parallax_messages_refused_total{kind="frame"} 1.0' in cluster._metrics.page()


async def test_a_head_that_reports_what_cannot_be_ends_its_ring_and_is_named_and_counted(
    cluster: ClusterService,
) -> None:
    _, _, epoch = await serving(cluster)
    head = cluster.reconciler.rings[0].nodes[0]
    cluster.requests.head_lost(epoch, MessageRefused("The head reports what cannot be"))
    assert cluster.reconciler.by_epoch(epoch) is None
    (broken,) = cluster._blame._breaks
    assert broken.suspects == (head,)
    assert broken.why == f"{cluster.name_of(head)}: The head reports what cannot be"
    assert b'parallax_messages_refused_total{kind="report"} 1.0' in cluster._metrics.page()


async def test_totals_that_shrink_and_figures_beyond_reason_hurt_nobody(
    cluster: ClusterService,
) -> None:
    first, _, epoch = await serving(cluster)
    most = (1 << 64) - 1
    for frames, seconds in ((most, 5e-324), (0, 0.0), (most, 1e18), (1, 0.0)):
        health = wire.StageHealth(
            epoch=epoch,
            decode_frames=frames,
            decode_tokens=most - frames,
            decode_compute_s=seconds,
            prefill_frames=frames,
            prefill_tokens=frames,
            prefill_compute_s=seconds,
            hops=frames,
            hop_s=seconds,
        )
        for _ in range(20):
            first.report(health=health)
            first.report(health=wire.StageHealth(epoch=epoch))
        cluster._wishes.look(1e9)
    first.report(link=wire.LinkReport(node_id="nobody", round_trip_s=0, bandwidth_bytes_s=0))
    assert not any("nobody" in way for way in cluster._roster.paths)

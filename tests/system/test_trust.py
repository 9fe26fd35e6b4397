"""Certificates of real nodes: renewed while answers flow, and good for rings that form later."""

from __future__ import annotations

import time
from pathlib import Path

from parallax.fabric.credentials import Papers
from tests.cluster import Cluster, boot
from tests.reference import Reference
from tests.system.test_answers import PROMPTS

LIFE_S = 3.0


def serials(cluster: Cluster) -> list[int]:
    """The certificates that the nodes have now."""
    files = [cluster.folder / name / "member.pem" for name in ("node0", "node1")]
    return [Papers.from_pem(f.read_bytes()).own.certificate.serial_number for f in files]


def test_certificates_are_renewed_without_a_break_and_serve_later_rings(
    model: Path, reference: Reference
) -> None:
    expected = reference.text(reference.greedy(PROMPTS[1], 20))

    def ask() -> None:
        said = cluster.chat(PROMPTS[1], max_tokens=20, temperature=0)
        assert said["choices"][0]["message"]["content"] == expected

    with boot(model, nodes=2, variables={"PARALLAX_LIMITS__CERTIFICATE_S": str(LIFE_S)}) as cluster:
        first = serials(cluster)
        seen = [{serial} for serial in first]
        end = time.monotonic() + 60
        while min(map(len, seen)) < 4:  # the first ones are over by now
            assert time.monotonic() < end
            ask()
            for known, serial in zip(seen, serials(cluster), strict=True):
                known.add(serial)
        for process in (cluster.scheduler, *cluster.nodes):
            assert "broke" not in process.output
        cluster.nodes.pop().stop()
        cluster.join("node1")  # needs neither token nor approval
        status = cluster.wait(
            lambda s: (
                any(r["status"] == "ready" and len(r["stages"]) == 2 for r in s["rings"])
                or sum(r["status"] == "ready" for r in s["rings"]) == 2
            )
        )
        assert {s["name"] for ring in status["rings"] for s in ring["stages"]} == {"node0", "node1"}
        ask()

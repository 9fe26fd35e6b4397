"""Certificates of real nodes: renewed while answers flow, and good for rings that form later."""

from __future__ import annotations

import time
from pathlib import Path

from parallax.fabric.credentials import Papers
from tests.cluster import Cluster, boot
from tests.reference import Reference
from tests.system.test_answers import PROMPTS

LIFE_S = 4.0
SLACK_S = 1.5  # for a renewal that is late


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

    variables = {
        "PARALLAX_LIMITS__CERTIFICATE_S": str(LIFE_S),
        "PARALLAX_LIMITS__CALL_S": str(SLACK_S),
    }
    with boot(model, nodes=2, variables=variables) as cluster:
        first = serials(cluster)
        seen = [{serial} for serial in first]
        begin = time.monotonic()
        # Those that the streams came in with are over by now.
        while time.monotonic() < begin + LIFE_S + SLACK_S or min(map(len, seen)) < 3:
            assert time.monotonic() < begin + 60
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

"""``python -m tests.chaos [PART…]``: the long campaigns, as a table and as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.arena import arena, make_arena_model
from tests.chaos.checker import check
from tests.chaos.crowd import pauses, run_crowd
from tests.chaos.kills import KINDS, MOMENTS, Expected, Kill, Outcome, patience_s, run_kill, table
from tests.chaos.soak import run_soak
from tests.chaos.stops import run_disturbed, stale_frames
from tests.reference import Reference

Row = dict[str, Any]
Child = subprocess.Popen[str]


def kills(expected: Expected, given: argparse.Namespace) -> list[Row]:
    """Kill -9 each stage in turn at the first token, in the middle and at the last one."""
    outcomes: list[Outcome] = []
    patient = {"PARALLAX_LIMITS__REQUEST_S": f"{patience_s(given.context)}"}
    with arena(expected.model, variables=patient) as made:
        for number in range(given.runs):
            if given.prepared:
                made.wait_prepared()
            kill = Kill(
                stage=number % 2,
                moment=MOMENTS[number // 2 % len(MOMENTS)],
                kind=tuple(KINDS)[number // (2 * len(MOMENTS)) % 2],
                context=given.context,
            )
            outcomes.append(run_kill(made, expected, kill))
            say(f"{number + 1}: {kill} {outcomes[-1].pause_s:.2f} s {outcomes[-1].why}")
            made.join()
            made.wait_whole(2, 1)
    verdict = check(made.journal, [o.history for o in outcomes], expected.of_tokens)
    for line in verdict.wrong:
        say(line)
    return [row | {"journal": len(verdict.wrong)} for row in table(outcomes)]


def crowd(expected: Expected, given: argparse.Namespace) -> list[Row]:
    """8 clients with 100 requests each, and one kill in the middle."""
    with arena(expected.model) as made:
        found = run_crowd(
            made,
            expected,
            clients=8,
            requests=given.requests,
            tokens=24,
            midway=lambda: made.kill(made.stage(1)) and None,
        )
        made.wait_whole(2, 0)
    verdict = check(made.journal, found.histories, expected.of_tokens)
    for line in (*found.wrong, *verdict.wrong):
        say(line)
    row = {"requests": len(found.histories), "failed": found.failed}
    return [row | {"worst_s": round(pauses(found.histories)[-1], 3), "journal": len(verdict.wrong)}]


def stops(expected: Expected, given: argparse.Namespace) -> list[Row]:
    """SIGSTOP of a stage for 2, 10 and 60 s, then SIGCONT."""
    rows: list[Row] = []
    histories = []
    with arena(expected.model) as made:
        for seconds in (2, 10, 60):
            for stage in (0, 1):
                made.wait_whole(2, 1)
                child = made.processes[made.stage(stage)].child

                def nap(child: Child = child, seconds: int = seconds) -> None:
                    child.send_signal(signal.SIGSTOP)
                    time.sleep(seconds)
                    child.send_signal(signal.SIGCONT)

                history, wrong = run_disturbed(made, expected, nap)
                histories.append(history)
                pause_s = round(history.pause_s, 2)
                rows.append({"stop_s": seconds, "stage": stage, "pause_s": pause_s})
                rows[-1] |= {"failed": int(bool(wrong)), "stale": stale_frames(made), "journal": 0}
        made.wait_whole(2, 1)
    verdict = check(made.journal, histories, expected.of_tokens)
    rows[-1]["journal"] = len(verdict.wrong)
    return rows


def restart(expected: Expected, given: argparse.Namespace) -> list[Row]:
    """The scheduler is killed under load and started again: nobody hangs, and it serves soon."""
    killed: list[float] = []
    with arena(expected.model) as made:
        found = run_crowd(
            made,
            expected,
            clients=8,
            requests=20,
            tokens=24,
            midway=lambda: killed.append(made.restart_scheduler()),
            patient=True,
        )
        made.wait_whole(2, 1)
    good = [h.arrivals[0] for h in found.histories if h.whole and h.asked_s > killed[0]]
    broken = [h for h in found.histories if h.error.startswith("connection")]
    other = [h for h in found.histories if h.error and h not in broken and h.status != 503]
    wrong = [why for why in found.wrong if "it failed" not in why]
    verdict = check(made.journal, found.histories, expected.of_tokens, killed=True)
    for line in (*wrong, *verdict.wrong):
        say(line)
    hung = max(h.ended_s - h.asked_s for h in broken) if broken else 0.0
    return [
        {
            "requests": len(found.histories),
            "broken": len(broken),
            "failed": len(wrong) + len(other),
            "served_again_s": round(min(good) - killed[0], 2),
            "longest_broken_s": round(hung, 2),
            "journal": len(verdict.wrong),
        }
    ]


def soak(expected: Expected, given: argparse.Namespace) -> list[Row]:
    """Random kills, stops, drains, farewells and joins, with clients that check every answer."""
    with arena(expected.model) as made:
        found = run_soak(made, expected, seconds=given.seconds, seed=given.seed)
    verdict = check(made.journal, found.histories, expected.of_tokens)
    for line in (*found.wrong, *found.left, *verdict.wrong):
        say(line)
    longest = pauses(found.histories)
    return [
        {
            "seconds": given.seconds,
            "requests": len(found.histories),
            "failed": len(found.wrong) + len(found.left),
            "went_away": found.went_away,
            "median_s": round(longest[len(longest) // 2], 3),
            "worst_s": round(longest[-1], 3),
            "journal": len(verdict.wrong),
            **found.deeds,
        }
    ]


PARTS: dict[str, Callable[[Expected, argparse.Namespace], list[Row]]] = {
    "kills": kills,
    "crowd": crowd,
    "stops": stops,
    "restart": restart,
    "soak": soak,
}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all but the soak if none")
    parser.add_argument("--runs", type=int, default=100, help="kills")
    parser.add_argument("--context", type=int, default=64, help="tokens at the kill")
    parser.add_argument(
        "--unprepared", dest="prepared", action="store_false", help="kill before spares are ready"
    )
    parser.add_argument("--requests", type=int, default=100, help="for each client of the crowd")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of the soak")
    parser.add_argument("--seed", type=int, default=1, help="of the soak")
    parser.add_argument("--out", type=Path, default=Path("build/chaos.json"))
    given = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="parallax-chaos-") as folder:
        model = make_arena_model(Path(folder) / "model")
        expected = Expected(Reference(model), model)
        for part in given.parts or [part for part in PARTS if part != "soak"]:
            begin = time.monotonic()
            results["parts"][part] = PARTS[part](expected, given)
            say(f"{part}: {time.monotonic() - begin:.0f} s")
            show(part, results["parts"][part])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=1) + "\n")
    rows = [row for part in results["parts"].values() for row in part]
    return int(any(row["failed"] or row["journal"] for row in rows))


def machine() -> Row:
    """Where the figures are from."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    memory = round(psutil.virtual_memory().total / (1 << 30))
    return {
        "commit": commit,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "load": round(os.getloadavg()[0], 1),
    }


def show(part: str, rows: list[Row]) -> None:
    """A table."""
    for row in rows:
        say(f"{part:12} " + "  ".join(f"{key} {value}" for key, value in row.items()))


def say(text: str) -> None:
    """One line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())

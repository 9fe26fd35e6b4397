"""``make bench``: a cluster through HTTP beside mlx-lm, on the same machine in the same run.

    python -m benchmarks [NAME ...] [--rounds N] [--dtype bfloat16] [--document]

The sides take turns, round by round; a figure is the median of the rounds, with the smallest and
the largest. Prints a table, adds the results to ``bench-speed.json`` and, with ``--document``,
draws the plots and fills the tables of ``docs/performance.md``. Ends with 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import (
    arrivals,
    chat,
    curves,
    hop,
    pipeline,
    report,
    serving,
    speculation,
    speed,
    step,
)
from benchmarks.bench import Bench, bench_of, machine, read_results
from benchmarks.figures import Part, Sheet

RESULTS = Path("bench-speed.json")
PARTS = (
    *speed.PARTS,
    *chat.PARTS,
    *speculation.PARTS,
    *pipeline.PARTS,
    *arrivals.PARTS,
    *hop.PARTS,
    *serving.PARTS,
    *curves.PARTS,
    *step.PARTS,
)


def measure(part: Part, bench: Bench) -> dict[str, Any]:
    """One part; what goes wrong in it is a reason why rows are missing, not the end of the rest."""
    begin = time.monotonic()
    print(f"\n{part.name}", flush=True)
    sheet = Sheet(part.rows, lambda text: print(f"  {text}", flush=True))
    try:
        part.measure(bench, sheet)
        why = "the part ended without it"
    except Exception as error:
        traceback.print_exc()
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
    sheet.close(why)
    seconds = time.monotonic() - begin
    print(f"  ({seconds:.0f} s)", flush=True)
    return {
        "machine": machine(bench.dtype),
        "rounds": bench.rounds,
        "seconds": round(seconds),
        **sheet.as_json(),
    }


def main() -> int:
    """Reads the command line, measures, prints, writes."""
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--document", action="store_true", help="fill docs/performance.md")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in names:
            parser.error(f"{name} is none of {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clusters end with it
    chosen = [part for part in PARTS if not arguments.names or part.name in arguments.names]
    print(report.machine_line(machine(arguments.dtype)), flush=True)
    results = read_results(RESULTS)
    with bench_of(arguments.rounds, arguments.nodes, arguments.dtype) as bench:
        for part in chosen:
            results["parts"][part.name] = measure(part, bench)
            ordered = {name: results["parts"][name] for name in names if name in results["parts"]}
            results = {"parts": ordered}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    measured = {part.name: results["parts"][part.name] for part in chosen}
    print(f"\n{report.table(measured)}")
    for note in report.notes(measured):
        print(note)
    if arguments.document:
        report.write_document(results["parts"])
    missed = any(row["met"] is False for part in measured.values() for row in part["rows"])
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

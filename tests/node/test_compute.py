"""The MLX thread of a process that ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PROGRAM = """
import asyncio, sys
from pathlib import Path
from parallax.node.compute import Compute
from parallax.node.runner import Runner
from parallax.node.weights import load_stage
from parallax.proto import wire_pb2 as wire

def answer():
    folder, verdicts = map(Path, sys.argv[1:])
    stage = load_stage(folder, 0, 4, progress=lambda *now: None, verdicts=verdicts)
    runner = Runner(stage, epoch=1, index=0, count=1)
    sampling = wire.Sampling(temperature=1, top_p=0.9, top_k=5, repetition_penalty=1.1)
    admit = wire.Admit(sequence=1, prompt=[1], sampling=sampling)
    frame = wire.Frame(
        epoch=1, kind=wire.DECODE, tokens=[1], rows=1, commands=[wire.Command(admit=admit)]
    )
    return len(runner.run(frame).tokens)

async def main():
    compute = Compute(asyncio.get_running_loop())
    print(await compute.call(answer))
    compute.stop(timeout_s=10)

asyncio.run(main())
"""


def test_a_process_whose_mlx_thread_has_computed_exits_cleanly(
    model_of: Callable[[str], Path], verdicts: Path
) -> None:
    """MLX aborts the process, about every second time, when a thread leaves its streams behind."""
    folder = model_of("qwen3")
    for _ in range(4):
        command = [sys.executable, "-c", PROGRAM, str(folder), str(verdicts)]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert (run.returncode, run.stdout, run.stderr) == (0, "1\n", "")

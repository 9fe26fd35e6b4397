"""Coverage-guided fuzzing (atheris, on Linux): ``python -m tests.fuzz --seconds 600 [TARGET…]``.

Each target has a process of its own. What is found goes to a folder of its own, and with ``--keep``
what covers more than the corpus did goes into the corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
SLOW_S = 20  # for one input, on a busy machine
MEMORY_MB = 3072
MOST_KEPT = 80  # inputs of one target in the corpus
MOST_BYTES = 4096  # of an input; more finds little and takes long


def main() -> int:
    """Fuzzes; the exit status says whether anything crashed."""
    if sys.argv[1:2] == ["--child"]:  # before anything is imported that is to be watched
        return _child(sys.argv[2], sys.argv[3:])
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=600, help="for each target (600)")
    parser.add_argument("--keep", action="store_true", help="grow the corpus")
    parser.add_argument("--crashes", type=Path, help="folder for inputs that crash")
    given = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; it is for Linux: make fuzz")
    unknown = set(given.targets) - set(TARGETS)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    crashes = given.crashes or Path(tempfile.mkdtemp(prefix="parallax-crashes-"))
    crashes.mkdir(parents=True, exist_ok=True)
    wanted = given.targets or list(TARGETS)
    failed = [t for t in wanted if not _fuzz(t, given.seconds, given.keep, crashes)]
    print(f"crashed: {', '.join(failed)}; see {crashes}" if failed else "nothing crashed")
    return 1 if failed else 0


def _fuzz(target: str, seconds: int, keep: bool, crashes: Path) -> bool:
    from tests.fuzz.seeds import seeds

    print(f"== {target}, {seconds} s", flush=True)
    with tempfile.TemporaryDirectory() as place:
        found = Path(place) / "found"
        found.mkdir()
        for seed in seeds(target):
            (found / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        corpus = CORPUS / target
        corpus.mkdir(parents=True, exist_ok=True)
        options = [
            f"-max_total_time={seconds}",
            f"-timeout={SLOW_S}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-max_len={MOST_BYTES}",
            f"-artifact_prefix={crashes}/{target}-",
            "-print_final_stats=1",
            "-verbosity=1",
        ]
        good = _run(target, [*options, str(found), str(corpus)])
        if keep and good:  # what covers more than seeds and corpus do, the smallest first
            kept = {file.name for file in corpus.iterdir()}
            for data in sorted((file.read_bytes() for file in found.iterdir()), key=len):
                name = hashlib.sha256(data).hexdigest()[:16]
                if len(kept) < MOST_KEPT:
                    (corpus / name).write_bytes(data)
                    kept.add(name)
    return good


def _run(target: str, options: list[str]) -> bool:
    warn = "error::RuntimeWarning"  # as in the tests
    command = [sys.executable, "-W", warn, "-m", "tests.fuzz", "--child", target, *options]
    return subprocess.run(command, check=False).returncode == 0


def _child(target: str, options: list[str]) -> int:
    import atheris

    with atheris.instrument_imports(include=["parallax", "jinja2", "msgpack"]):
        from tests.fuzz.targets import TARGETS

        made = TARGETS[target]()
        run = made.__enter__()  # for as long as the process lives: Fuzz() does not return
    atheris.Setup([f"fuzz-{target}", *options], run)
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())

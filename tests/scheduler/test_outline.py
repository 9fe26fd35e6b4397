"""Outlines of a hub's models, where the hub gives out parts of files and where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from parallax.fabric.models import open_folder
from tests.fabric.test_models import hub
from tests.models import make_model

OUTLINE = """
import sys
from pathlib import Path
from parallax.scheduler.outline import resolve
for _ in range(2):
    model = resolve("someone/tiny", state_dir=Path(sys.argv[1]))
    print(model.digest, (model.path / "parts").exists(), (model.path / "tokenizer.json").exists())
"""


def test_a_hub_without_parts_of_files_is_asked_for_the_whole_model(tmp_path: Path) -> None:
    made = make_model(tmp_path / "made", shards=2)
    with hub(made) as endpoint:
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        said = subprocess.run(
            [sys.executable, "-c", OUTLINE, str(tmp_path / "state")],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        ).stdout
    digest = open_folder(made, name="someone/tiny", location="someone/tiny").digest
    assert said.splitlines() == [f"{digest} False True"] * 2

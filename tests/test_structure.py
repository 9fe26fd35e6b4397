"""docs/structure.md names every file of the rooms, and no file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("fabric", "node", "scheduler", "cli")


def listed() -> set[str]:
    text = (ROOT / "docs" / "structure.md").read_text().split("## Files")[1]
    found: set[str] = set()
    for part in re.split(r"^\*\*`", text, flags=re.M)[1:]:
        room = part.split("/`**")[0]
        for cell in re.findall(r"^\| `([^`]+)` \|", part, re.M):
            found |= {f"{room}/{name.strip()}" for name in cell.split(",")}
    return found


def test_every_file_is_in_the_structure_and_nothing_else_is() -> None:
    names = listed()
    there = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert there - names == set(), "files that docs/structure.md does not name"
    missing = {name for name in names if not (ROOT / name).exists()}
    assert missing == set(), "docs/structure.md names files that are not there"

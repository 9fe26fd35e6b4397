"""What the cluster has done since it first ran: totals that outlive the process. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(slots=True)
class Totals:
    """Chat requests that were accepted, and the tokens of their prompts and answers."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def told(self) -> dict[str, int]:
        """Every figure, for :meth:`recall`."""
        return asdict(self)

    def recall(self, told: object) -> None:
        """Adds what earlier processes counted; what makes no sense is left out."""
        known = told if isinstance(told, dict) else {}
        for each in fields(self):
            before = known.get(each.name)
            if isinstance(before, int) and before > 0:
                setattr(self, each.name, getattr(self, each.name) + before)

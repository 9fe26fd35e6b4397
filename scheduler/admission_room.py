"""Who is forgotten when as many nodes are remembered as can be, and who came in how often. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from parallax.fabric.certificates import SKEW
from parallax.scheduler.admission_values import Known, Standing


def least_needed(nodes: Collection[Known], certificate_s: float, now: float) -> Known | None:
    """Whom to forget so that somebody else can be remembered; None: nobody.

    First those that were let in and never came: with a token, then in any other way. Then those
    that were sent away, once no certificate of theirs can be good any more: nobody has to be told
    of them then, and they are strangers as any other.

    Args:
        nodes: all that are remembered, the oldest decision first.
        certificate_s: the longest that a certificate of any of them was made for.
        now: seconds since 1970.
    """
    over_s = now - certificate_s - SKEW.total_seconds()
    idle = [known for known in nodes if known.idle]
    with_token = (known for known in idle if token_of(known))
    gone = (k for k in nodes if k.standing is not Standing.ADMITTED and k.since_s < over_s)
    return next(with_token, None) or next(iter(idle), None) or next(gone, None)


def token_of(known: Known) -> str:
    """How it came in, if that was with a token; else nothing."""
    return known.how if known.how.startswith("token ") else ""


def idle_by_token(nodes: Iterable[Known]) -> Counter[str]:
    """How many came in with each token and have never attended."""
    return Counter(token for known in nodes if known.idle and (token := token_of(known)))

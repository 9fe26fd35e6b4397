"""Who may be a node of this cluster: tokens, those who wait to be let in, those who were sent away.

A pure machine. Identity has been proved before anybody asks here: a node id is the
key that the asking node holds. Times are seconds since 1970, handed in, because
tokens outlive the process. What must be remembered comes out as changes
(:meth:`Admission.take_changes`); whoever runs this machine has them on disk
before the answer leaves.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from parallax.fabric.errors import InvalidRequest, JoinRefused, UnknownNode, UnknownToken
from parallax.fabric.identity import fingerprint, public_key_of
from parallax.scheduler import refusals
from parallax.scheduler.admission_room import idle_by_token, least_needed, token_of
from parallax.scheduler.admission_values import (
    Admitted,
    Change,
    DropNode,
    DropToken,
    Known,
    Pending,
    Refused,
    Remembered,
    SaveNode,
    SaveToken,
    Standing,
    Verdict,
    Waiting,
)
from parallax.scheduler.tokens import MOST_CHARACTERS, Token, TokenState, digest_of, id_of
from parallax.scheduler.wrong_tokens import WrongTokens

MOST_PENDING = 64
MOST_PENDING_PER_ADDRESS = 8
PENDING_SILENT_S = 60.0  # who waits asks every few seconds; who stops asking has gone away
MOST_TOKENS = 1024
MOST_NODES = 16_384  # remembered, whatever was decided about them
MOST_DENIED = 1024  # of these the oldest are forgotten first; they may only ask again
KEEP_TOKEN_S = 7 * 86_400.0  # how long one that opens nothing any more stays in the list
LONGEST_TOKEN_S = 10 * 366 * 86_400.0
MOST_NAME = 63
MOST_NOTE = 200


@dataclass(slots=True)
class Admission:
    """See the module; with ``open`` everybody is let in who was not sent away by name."""

    scheduler_id: str
    open: bool = False
    most_idle: int = 64  # members that came in with one token and have never attended
    certificate_s: float = 7 * 86_400.0  # the longest that a certificate was ever made for
    refused: Counter[str] = field(default_factory=Counter)  # by reason, since the start
    _tokens: dict[bytes, Token] = field(default_factory=dict)
    _nodes: dict[str, Known] = field(default_factory=dict)
    _idle: Counter[str] = field(default_factory=Counter)  # by token
    _pending: dict[str, Pending] = field(default_factory=dict)
    _wrong: WrongTokens = field(default_factory=WrongTokens)
    _changes: list[Change] = field(default_factory=list)

    def recall(self, remembered: Remembered) -> None:
        """Takes up what an earlier process wrote down."""
        self._tokens = {token.digest: token for token in remembered.tokens}
        self._nodes = {known.node_id: known for known in remembered.nodes}
        self._idle = idle_by_token(remembered.nodes)

    def take_changes(self) -> list[Change]:
        """What is to be written down, in this order; asked for once."""
        changes, self._changes = self._changes, []
        return changes

    # ------------------------------------------------------------- who comes in

    def ask(
        self, node_id: str, name: str, token: str, *, local: bool, now: float, address: str = ""
    ) -> Verdict:
        """A node wants to be a member.

        Args:
            node_id: the key that it has proved to hold.
            name: what it calls itself; nobody has proved that.
            token: what it brings; empty: nothing.
            local: it runs on the scheduler's machine.
            now: seconds since 1970.
            address: the host that it calls from.
        """
        name = _clean(name, MOST_NAME)
        known = self._nodes.get(node_id)
        standing = known.standing if known else None
        if standing is Standing.ADMITTED:
            return Admitted()
        if standing is None and self.open:
            self._pending.pop(node_id, None)
            return Admitted()
        if standing is None and local:
            return self._admit(node_id, name, "local", now)
        if token:
            return self._by_token(node_id, name, token, known, address, now)
        if known is not None and standing is not None:
            return self._refuse(_sent_away(known))
        return self._wait(node_id, name, address, now)

    def attended(self, node_id: str) -> None:
        """A member attends: it is no key that was only made up."""
        known = self._nodes.get(node_id)
        if known is not None and known.idle:
            self._nodes[node_id] = replace(known, attended=True)
            self._count(known, -1)
            self._changes.append(SaveNode(self._nodes[node_id]))

    def allowed(self, node_id: str) -> bool:
        """Whether this node is a member right now, or may become one without being asked."""
        known = self._nodes.get(node_id)
        return self.open if known is None else known.standing is Standing.ADMITTED

    def removed(self, node_id: str) -> bool:
        """Whether this node was sent away."""
        known = self._nodes.get(node_id)
        return known is not None and known.standing is Standing.REMOVED

    def lasting(self, node_id: str) -> bool:
        """Whether it is a member because somebody let it in, not only because all are."""
        known = self._nodes.get(node_id)
        return known is not None and known.standing is Standing.ADMITTED

    def pending(self, now: float) -> list[Pending]:
        """Who waits, the longest first."""
        self._forget_silent(now)
        return list(self._pending.values())

    def known(self) -> list[Known]:
        """Everybody about whom something was decided."""
        return list(self._nodes.values())

    def came_with(self, node_id: str) -> list[Known]:
        """The other members that came in with the same token as this node, the oldest first."""
        known = self._nodes.get(node_id)
        token = token_of(known) if known else ""
        return [
            other
            for other in self._nodes.values()
            if token
            and other.how == token
            and other.node_id != node_id
            and other.standing is Standing.ADMITTED
        ]

    # ---------------------------------------------------------- who decides that

    def find(self, word: str) -> str:
        """The node that its id, or the fingerprint of one that waits, names.

        Raises:
            UnknownNode: none that waits or is known; or the word names two.
        """
        if word in self._pending or word in self._nodes:
            return word
        wanted = _letters(word)
        waiting = self._pending.values()
        found = [p.node_id for p in waiting if _letters(p.fingerprint) == wanted]
        if len(found) == 1:
            return found[0]
        if len(found) > 1:
            raise UnknownNode(
                f"Two nodes have the fingerprint {word}",
                "One of them may have been made to look like the other",
                "Name the one you mean by its whole id",
                node=word,
            )
        try:
            public_key_of(word)
        except Exception:
            raise UnknownNode(
                f"No node '{word}' waits here",
                "It is neither the id of a node nor the fingerprint of one that waits",
                "'parallax nodes' lists them all",
                node=word,
            ) from None
        return word  # somebody may be let in before it comes

    def approve(self, node_id: str, now: float, name: str = "") -> Known:
        """Lets a node in, whether it waits, was sent away or has yet to come.

        Raises:
            JoinRefused: no more nodes can be remembered.
        """
        known = self._nodes.get(node_id)
        if known is not None and known.standing is Standing.ADMITTED:
            return known
        pending = self._pending.get(node_id)
        name = pending.name if pending else name or (known.name if known else "")
        if known is None and not self._has_room(now):
            raise refusals.full(MOST_NODES)
        return self._decide(node_id, name, Standing.ADMITTED, "approval", now)

    def deny(self, node_id: str, now: float) -> Known:
        """Refuses a node that waits, from now on.

        Raises:
            InvalidRequest: it is a member already.
        """
        known = self._nodes.get(node_id)
        if known is not None and known.standing is Standing.ADMITTED:
            raise InvalidRequest(
                f"{known.name or node_id} is a member already",
                fix="Use 'parallax nodes remove' to send it away, with --now at once",
                field="node",
            )
        if known is not None and known.standing is Standing.REMOVED:
            return known  # which is more than a denial
        denied = [k for k in self._nodes.values() if k.standing is Standing.DENIED]
        for oldest in denied[: max(0, len(denied) - MOST_DENIED + 1)]:
            self._forget(oldest.node_id)
        pending = self._pending.get(node_id)
        return self._decide(node_id, pending.name if pending else "", Standing.DENIED, "", now)

    def remove(self, node_id: str, now: float, name: str = "") -> Known:
        """Sends a node away: it is refused from now on.

        Until it is approved, or brings a token that was made after this. The token that it came
        with is revoked: a new key costs nothing, and it would let that in.
        """
        known = self._nodes.get(node_id)
        if known is not None and known.standing is Standing.REMOVED:
            return known
        for token in self.tokens():
            if known is not None and known.how == _came_with(token) and token.revoked_s is None:
                self._keep(replace(token, revoked_s=now))
        name = name or (known.name if known else "")
        how = known.how if known else ""  # by which it is known who came with it
        return self._decide(node_id, name, Standing.REMOVED, how, now)

    # ------------------------------------------------------------------- tokens

    def add_token(
        self, token: str, *, expires_s: float, uses: int | None, note: str, now: float
    ) -> Token:
        """A new way in. ``expires_s`` is how long from now, ``uses`` None is without limit.

        Raises:
            InvalidRequest: a figure is out of range, or there are too many tokens.
        """
        if not 0 < expires_s <= LONGEST_TOKEN_S:
            raise InvalidRequest(
                "A token must expire between now and ten years from now", field="expires_s"
            )
        if uses is not None and uses < 1:
            raise InvalidRequest("A token must be good for one node at least", field="uses")
        self._forget_tokens(now)
        if len(self._tokens) >= MOST_TOKENS:
            raise InvalidRequest(
                f"There are {MOST_TOKENS} tokens already, and all of them are good",
                fix="Revoke some: parallax tokens revoke ID",
                field="tokens",
            )
        digest = digest_of(token)
        made = Token(id_of(digest), digest, _clean(note, MOST_NOTE), now, now + expires_s, uses)
        return self._keep(made)

    def revoke(self, token_id: str, now: float) -> Token:
        """From now on this token opens nothing; who came with it stays a member.

        Raises:
            UnknownToken: there is no such token.
        """
        for token in self._tokens.values():
            if token.id == token_id:
                return (
                    token
                    if token.revoked_s is not None
                    else self._keep(replace(token, revoked_s=now))
                )
        raise UnknownToken(
            f"There is no token '{token_id}'",
            "Tokens are named by the ID in the first column of their list",
            "'parallax tokens list' lists them",
            token=token_id,
        )

    def tokens(self) -> list[Token]:
        """All that are remembered, the oldest first."""
        return sorted(self._tokens.values(), key=lambda token: token.created_s)

    # ------------------------------------------------------------------- inside

    def _admit(self, node_id: str, name: str, how: str, now: float) -> Verdict:
        if node_id not in self._nodes and not self._has_room(now):
            return self._refuse(refusals.full(MOST_NODES))
        self._decide(node_id, name, Standing.ADMITTED, how, now)
        return Admitted(new=True)

    def _has_room(self, now: float) -> bool:
        """Whether one more node can be remembered; whoever is least needed makes room for it."""
        if len(self._nodes) >= MOST_NODES:
            known = least_needed(self._nodes.values(), self.certificate_s, now)
            if known is None:
                return False
            self._forget(known.node_id)
        return True

    def _decide(self, node_id: str, name: str, standing: Standing, how: str, now: float) -> Known:
        before = self._nodes.get(node_id)
        attended = before is not None and before.attended
        known = Known(node_id, _clean(name, MOST_NAME), standing, now, how, attended)
        self._pending.pop(node_id, None)
        self._drop(node_id)  # the latest decision stands last
        self._nodes[node_id] = known
        self._count(known, +1)
        self._changes.append(SaveNode(known))
        return known

    def _by_token(
        self, node_id: str, name: str, word: str, known: Known | None, address: str, now: float
    ) -> Verdict:
        token = self._tokens.get(digest_of(word)) if len(word) <= MOST_CHARACTERS else None
        state = token.state(now) if token else None
        removed = known is not None and known.standing is Standing.REMOVED
        if token is None or state is not TokenState.GOOD:
            pause_s = self._wrong.count(address, now)
            if pause_s is not None:
                return self._refuse(refusals.too_many(pause_s))
            if removed and token is not None:
                return self._refuse(refusals.removed())  # which says more than what ended the token
            return self._refuse(refusals.wrong_token(token, state))
        if known is not None and removed and token.created_s <= known.since_s:
            return self._refuse(refusals.removed())
        if self._idle[_came_with(token)] >= self.most_idle:
            return self._refuse(refusals.crowded(token, self.most_idle))
        if known is None and not self._has_room(now):
            return self._refuse(refusals.full(MOST_NODES))
        # Its use first: should the process end between the two, a use is lost, not won.
        self._keep(replace(token, uses=token.uses + 1))
        return self._admit(node_id, name, _came_with(token), now)

    def _wait(self, node_id: str, name: str, address: str, now: float) -> Verdict:
        self._forget_silent(now)
        old = self._pending.get(node_id)
        if old is not None:
            self._pending[node_id] = replace(old, name=name, address=address, asked_s=now)
            return Waiting(old.fingerprint)
        crowd = sum(pending.address == address for pending in self._pending.values())
        if len(self._pending) >= MOST_PENDING or crowd >= MOST_PENDING_PER_ADDRESS:
            return Waiting("", listed=False)  # those who came first keep their places
        print_ = fingerprint(self.scheduler_id, node_id)  # made to be slow: not for everybody
        self._pending[node_id] = Pending(node_id, name, address, print_, now, now)
        return Waiting(print_, new=True)

    def _refuse(self, error: JoinRefused) -> Refused:
        self.refused[error.fields["reason"]] += 1
        return Refused(error)

    def _keep(self, token: Token) -> Token:
        self._tokens[token.digest] = token
        self._changes.append(SaveToken(token))
        return token

    def _drop(self, node_id: str) -> None:
        known = self._nodes.pop(node_id, None)
        if known is not None:
            self._count(known, -1)

    def _count(self, known: Known, by: int) -> None:
        token = token_of(known)
        if known.idle and token:
            self._idle[token] += by
            if not self._idle[token]:
                del self._idle[token]

    def _forget(self, node_id: str) -> None:
        self._drop(node_id)
        self._changes.append(DropNode(node_id))

    def _forget_silent(self, now: float) -> None:
        for pending in list(self._pending.values()):
            if now - pending.asked_s > PENDING_SILENT_S:
                del self._pending[pending.node_id]

    def _forget_tokens(self, now: float) -> None:
        """Forgets tokens that opened nothing for long; when there are many, at once."""
        dead = [t for t in self.tokens() if t.state(now) is not TokenState.GOOD]
        room = MOST_TOKENS - 1 - len(self._tokens)
        for index, token in enumerate(dead):
            ended = min(token.expires_s, token.revoked_s or token.expires_s)
            if now - ended > KEEP_TOKEN_S or room + index < 0:
                del self._tokens[token.digest]
                self._changes.append(DropToken(token.id))


def _came_with(token: Token) -> str:
    return f"token {token.id}"


def _clean(text: str, most: int) -> str:
    """Text of strangers as it may be kept and shown."""
    return "".join(c for c in text[: 4 * most] if c.isprintable())[:most]


def _letters(text: str) -> str:
    return "".join(c for c in text.upper() if c.isalnum())


def _sent_away(known: Known) -> JoinRefused:
    return refusals.removed() if known.standing is Standing.REMOVED else refusals.denied()

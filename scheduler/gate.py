"""The shell around admission: its clock, its disk, its token of the day, its voice."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from parallax.fabric.errors import BadSetting, ParallaxError
from parallax.fabric.events import Event, NodeAsks
from parallax.fabric.limits import DEFAULT_LIMITS
from parallax.scheduler import admission_store
from parallax.scheduler.admission import Admission
from parallax.scheduler.admission_values import (
    Admitted,
    Change,
    Known,
    Pending,
    Refused,
    Standing,
    Verdict,
    Waiting,
)
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.store import Store
from parallax.scheduler.tokens import Token, TokenState, new_token

log = logging.getLogger(__name__)

RUN_NOTE = "made by parallax run"
OPEN_CERTIFICATE_S = 3600.0  # who is let in by --open alone: nobody could take it back later
USUAL_CERTIFICATE_S = DEFAULT_LIMITS.certificate_s
LONGEST = "longest certificate"  # a note
RENEW_AT = 0.5  # of its life: what is shown is good for at least as much longer


class Gate:
    """Answers nodes that ask to come in, and people who decide about them.

    Nothing is answered before it is on disk. What could not be written is written
    first next time, so the disk never lags behind an answer.
    """

    def __init__(
        self,
        scheduler_id: str,
        store: Store,
        metrics: Metrics,
        on_event: Callable[[Event], None],
        *,
        open_to_all: bool = False,
        token_s: float = 86_400.0,
        certificate_s: float = 7 * 86_400.0,
        most_idle: int = 64,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._scheduler_id = scheduler_id
        self._store = store
        self._metrics = metrics
        self._on_event = on_event
        self._token_s = token_s
        self._certificate_s = certificate_s
        self.decided: Callable[[], None] = lambda: None  # told of each decision about a node
        self._clock = clock
        self._admission = Admission(scheduler_id, open_to_all, most_idle)
        self._writing = asyncio.Lock()
        self._unwritten: list[Change] = []
        self._shown = ""  # the plain token of the join command: in memory only
        self._shown_token: Token | None = None

    async def start(self) -> None:
        """Takes up what was remembered, and makes the token of the join command.

        Raises:
            BadSetting: the state file cannot be used.
        """
        self._admission.recall(await admission_store.remembered(self._store))
        self._admission.certificate_s = await self._longest_certificate_s()
        await self.renew()

    @property
    def open(self) -> bool:
        """Whether everybody is let in."""
        return self._admission.open

    # ---------------------------------------------------------------- for nodes

    async def ask(
        self, node_id: str, name: str, token: str, *, local: bool, address: str
    ) -> Verdict:
        """See :meth:`Admission.ask`; the answer is on disk when this returns.

        Raises:
            BadSetting: it could not be written down; the node may ask again.
        """
        verdict = self._admission.ask(
            node_id, name, token, local=local, now=self._clock(), address=address
        )
        match verdict:
            case Admitted(new=True):
                log.info("node %s (%s) is let in", node_id, address)
            case Waiting(fingerprint, new=True):
                self._on_event(NodeAsks(_shown(name), address, fingerprint))
            case Refused(error):
                reason = error.fields["reason"]
                self._metrics.join_refused(reason)
                if reason != "too_many":
                    log.warning("node %s at %s was refused: %s", node_id, address, error.sentence)
        await self.write()
        return verdict

    def attended(self, node_id: str) -> None:
        """See :meth:`Admission.attended`; :meth:`write` follows."""
        self._admission.attended(node_id)

    def allowed(self, node_id: str) -> bool:
        """See :meth:`Admission.allowed`."""
        return self._admission.allowed(node_id)

    def admitted(self) -> dict[str, str]:
        """The names of those that may be members, whether they attend or not, by id."""
        return {k.node_id: k.name for k in self.known() if k.standing is Standing.ADMITTED}

    def removed(self, node_id: str) -> bool:
        """See :meth:`Admission.removed`."""
        return self._admission.removed(node_id)

    def sent_away(self) -> list[str]:
        """Everybody who was denied or removed, however long ago.

        How long the certificates are good that they may have, no clock or setting of today tells.
        """
        return [k.node_id for k in self.known() if k.standing is not Standing.ADMITTED]

    def certificate_s(self, node_id: str) -> float:
        """How long a certificate for this node is to be good."""
        if self.open and not self._admission.lasting(node_id):
            return min(OPEN_CERTIFICATE_S, self._certificate_s)
        return self._certificate_s

    # --------------------------------------------------------------- for people

    def join_command(self) -> str:
        """What to type on another machine, with the token: for admins' eyes."""
        token = f" --token {self._shown}" if self._shown else ""
        return self.plain_join_command() + token

    def plain_join_command(self) -> str:
        """The same without the token: for everybody's eyes."""
        return f"parallax join -s {self._scheduler_id}"

    def pending(self) -> list[Pending]:
        """Who waits to be let in."""
        return self._admission.pending(self._clock())

    def known(self) -> list[Known]:
        """Everybody about whom something was decided."""
        return self._admission.known()

    def came_with(self, node_id: str) -> list[Known]:
        """See :meth:`Admission.came_with`."""
        return self._admission.came_with(node_id)

    async def approve(self, word: str) -> Known:
        """Lets in the node that an id or a fingerprint names.

        Raises:
            UnknownNode, JoinRefused, BadSetting.
        """
        known = self._admission.approve(self._admission.find(word), self._clock())
        await self.write()
        log.info("node %s is let in by approval", known.node_id)
        self.decided()
        return known

    async def deny(self, word: str) -> Known:
        """Refuses the node that an id or a fingerprint names; one that came by --open is cut off.

        Raises:
            UnknownNode, InvalidRequest.
            BadSetting: it could not be written down yet; the node is refused all the same.
        """
        known = self._admission.deny(self._admission.find(word), self._clock())
        self.decided()  # before it is written: a full disk must keep nobody in
        await self._write_down(known)
        log.info("node %s is refused from now on", known.node_id)
        return known

    async def remove(self, node_id: str, name: str = "") -> Known:
        """Sends a node away, and keeps it away, also under another key.

        The tokens that it has or may have seen let nobody in any more: that which it came with,
        and those of the join command, which has a new one from then on.

        Raises:
            BadSetting: it could not be written down yet; the node is refused all the same.
        """
        known = self._admission.remove(node_id, self._clock(), name)
        for token, state in self.tokens():
            if token.note == RUN_NOTE and state is TokenState.GOOD:
                self._admission.revoke(token.id, self._clock())
        self.decided()  # as above
        await self._write_down(known)
        log.info("node %s is removed, and the join command's token replaced", node_id)
        await self.renew(now_at_once=True)
        return known

    def tokens(self) -> list[tuple[Token, TokenState]]:
        """Every token and how it stands, the oldest first."""
        now = self._clock()
        return [(token, token.state(now)) for token in self._admission.tokens()]

    async def create_token(
        self, expires_s: float, uses: int | None = None, note: str = ""
    ) -> tuple[str, Token]:
        """A new token: itself, told this once, and what is remembered of it.

        Raises:
            InvalidRequest, BadSetting.
        """
        plain = new_token()
        token = self._admission.add_token(
            plain, expires_s=expires_s, uses=uses, note=note, now=self._clock()
        )
        await self.write()
        log.info("token %s is made: %s", token.id, token.note)
        return plain, token

    async def revoke_token(self, token_id: str) -> Token:
        """Revokes a token; that of the join command is replaced.

        Raises:
            UnknownToken, BadSetting.
        """
        token = self._admission.revoke(token_id, self._clock())
        await self.write()
        log.info("token %s is revoked", token.id)
        if self._shown_token is not None and token.id == self._shown_token.id:
            await self.renew(now_at_once=True)
        return token

    async def renew(self, *, now_at_once: bool = False) -> None:
        """Replaces the join command's token in time before it expires.

        Raises:
            InvalidRequest, BadSetting.
        """
        if self.open:
            return
        shown, now = self._shown_token, self._clock()
        half = shown is None or now >= shown.created_s + RENEW_AT * self._token_s
        if half or now_at_once or not self._is_good(shown):
            self._shown, self._shown_token = await self.create_token(self._token_s, note=RUN_NOTE)

    def _is_good(self, shown: Token | None) -> bool:
        """Not where a full disk came between its revocation and the next one."""
        good = TokenState.GOOD
        return any(shown and token.id == shown.id and s is good for token, s in self.tokens())

    async def keep_renewing(self, every_s: float = 60.0) -> None:
        """Watches the join command's token until cancelled."""
        while True:
            await asyncio.sleep(every_s)
            with suppress(ParallaxError):  # a full disk: the present one is good for a while
                await self.renew()

    async def _longest_certificate_s(self) -> float:
        """The longest that certificates were ever made for here, by today's setting or another."""
        told = await self._store.note(LONGEST)
        before = float(told) if isinstance(told, int | float) else USUAL_CERTIFICATE_S
        longest = max(before, self._certificate_s)
        if longest != told:
            await self._store.keep(LONGEST, longest)
        return longest

    async def _write_down(self, refused: Known) -> None:
        try:
            await self.write()
        except BadSetting as error:
            raise BadSetting(
                f"{refused.name or refused.node_id} is refused from now on, but not yet on disk",
                error.sentence,
                "That is tried again by itself; a scheduler that is started before then forgets it",
                **error.fields,
            ) from None

    async def write(self) -> None:
        """Writes down whatever is not on disk yet.

        Raises:
            BadSetting: it could not be written.
        """
        async with self._writing:
            self._unwritten += self._admission.take_changes()
            while self._unwritten:
                await admission_store.write(self._store, self._unwritten[0])
                del self._unwritten[0]


def _shown(name: str) -> str:
    return "".join(c for c in name[:63] if c.isprintable())

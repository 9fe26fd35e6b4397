"""A scheduler's process: its listeners, its cluster, its HTTP, its place on the network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc.aio

from parallax.fabric.addresses import host_port, listening_addresses
from parallax.fabric.authority import Authority
from parallax.fabric.channels import listen, stop_listening
from parallax.fabric.claim import claim
from parallax.fabric.credentials import Credentials
from parallax.fabric.discovery import advertise
from parallax.fabric.errors import ClusterError, PortInUse
from parallax.fabric.events import Event, Problem, Started, Stopped
from parallax.fabric.hosts import ANYWHERE, address, own_names
from parallax.fabric.identity import load_identity
from parallax.fabric.local_key import LocalKey, kept
from parallax.fabric.members import Anybody, MembersOnly
from parallax.fabric.settings import SchedulerSettings, host_name
from parallax.proto import wire_pb2_grpc as rpc
from parallax.scheduler.api_keys import KeyRing, new_secret
from parallax.scheduler.cluster import ClusterService
from parallax.scheduler.control import EnrolService, MembershipService
from parallax.scheduler.http.access import Access
from parallax.scheduler.http.server import make_app, serve
from parallax.scheduler.http.tls import server_context
from parallax.scheduler.journal import Journal
from parallax.scheduler.key_store import KeyStore
from parallax.scheduler.metrics import Metrics
from parallax.scheduler.status import notices_of
from parallax.scheduler.store import Store


async def serve_scheduler(
    settings: SchedulerSettings,
    *,
    on_event: Callable[[Event], None],
    stop: asyncio.Event | None = None,
) -> None:
    """Runs a scheduler until ``stop`` is set, or for good.

    Raises:
        ParallaxError: a port is taken, the state directory is not usable, or
            the model of the settings cannot be used.
    """
    limits = settings.limits
    async with AsyncExitStack() as closing:
        closing.enter_context(claim(settings.state_dir, "scheduler"))
        tls = None
        if settings.tls_cert is not None and settings.tls_key is not None:
            tls = server_context(settings.tls_cert, settings.tls_key)
        identity = load_identity(settings.state_dir / "identity.key")
        authority = Authority.load(settings.state_dir / "authority.key", identity)
        credentials = Credentials(identity)
        credentials.adopt(authority.own_papers())
        store = await closing.enter_async_context(await Store.open(settings.state_dir))
        metrics = Metrics()
        journal = None
        if settings.journal is not None:
            journal = Journal(settings.journal, tokens=settings.journal_tokens)
            closing.callback(journal.close)
        cluster = ClusterService(settings, credentials, store, metrics, on_event, journal)
        await cluster.gate.start()
        gate = MembersOnly(cluster.gate.allowed, cluster.tally)
        addresses = listening_addresses(loopback_only=settings.loopback_only)

        def members(server: grpc.aio.Server) -> None:
            service = MembershipService(cluster, authority, limits, gate)
            rpc.add_MembershipServicer_to_server(service, server)
            rpc.add_WeightsServicer_to_server(cluster.weights, server)

        async def cluster_listener(port: int) -> tuple[grpc.aio.Server, int]:
            return await listen(
                addresses,
                port,
                credentials=credentials,
                gate=gate,
                limits=limits,
                register=members,
            )

        # Next to the enrol port where that is free, so that firewalls need one rule.
        beside = settings.grpc_port + 1 if 0 < settings.grpc_port < 65535 else 0
        try:
            member_server, cluster_port = await cluster_listener(beside)
        except PortInUse:
            member_server, cluster_port = await cluster_listener(0)
        closing.push_async_callback(stop_listening, member_server)

        def strangers(server: grpc.aio.Server) -> None:
            service = EnrolService(
                identity.peer_id,
                cluster_port,
                door=cluster.gate,
                authority=authority,
                tally=cluster.tally,
            )
            rpc.add_EnrolServicer_to_server(service, server)

        enrol_server, enrol_port = await listen(
            addresses,
            settings.grpc_port,
            credentials=credentials,
            gate=Anybody(cluster.tally),
            limits=limits,
            register=strangers,
        )
        closing.push_async_callback(stop_listening, enrol_server)

        key_store = await KeyStore.open(store)
        local_secret = new_secret()
        app = make_app(
            cluster,
            limits=limits,
            metrics=metrics,
            access=Access.of(settings, own_names()),
            keys=KeyRing(await key_store.all(), local_secret),
            key_store=key_store,
            gate=cluster.gate,
            departures=cluster.departures,
        )
        runner, http_port = await serve(app, settings.host, settings.port, tls)
        closing.push_async_callback(runner.cleanup)
        shown = str(settings.tls_cert) if settings.tls_cert else None
        named = address(settings.host) is None
        local = LocalKey(
            runner.addresses[0][0] if named else settings.host,
            http_port,
            local_secret,
            shown,
            settings.host if named else "",
        )
        closing.enter_context(kept(settings.state_dir, local))
        closing.push_async_callback(cluster.stop)

        on_event(
            Started(
                peer_id=identity.peer_id,
                http_port=http_port,
                enrol_port=enrol_port,
                cluster_port=cluster_port,
                page=f"{'https' if tls else 'http'}://"
                f"{host_port(ANYWHERE.get(settings.host, settings.host), http_port)}",
                join_command=cluster.join_command(),
                notice="\n".join(notices_of(settings)),
            )
        )
        try:
            await closing.enter_async_context(
                advertise(
                    peer_id=identity.peer_id,
                    name=host_name(),
                    enrol_port=enrol_port,
                    loopback_only=settings.loopback_only,
                )
            )
        except ClusterError as error:  # nodes can still join with -s host:port
            on_event(Problem(error))
        asked = asyncio.create_task((stop or asyncio.Event()).wait())
        starting = asyncio.create_task(cluster.start())  # it may have to fetch a model
        try:
            await asyncio.wait({asked, starting}, return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                await starting
                await asked
        finally:
            for task in (asked, starting):
                task.cancel()
            await asyncio.gather(asked, starting, return_exceptions=True)
    on_event(Stopped())

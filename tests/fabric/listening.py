"""``python -m tests.fabric.listening PAPERS``: a member that listens until its input ends."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from parallax.fabric.addresses import Address, Kind
from parallax.fabric.channels import listen
from parallax.fabric.credentials import Credentials, Papers
from parallax.fabric.limits import Limits
from tests.trust import everyone, identity


async def main(papers: bytes) -> None:
    """Says its port first."""
    credentials = Credentials(identity("alice"))
    credentials.adopt(Papers.from_pem(papers))
    loopback = Address("127.0.0.1", "lo", Kind.LOOPBACK)
    server, port = await listen(
        [loopback],
        0,
        credentials=credentials,
        gate=everyone(),
        limits=Limits(),
        register=lambda _: None,
    )
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]).read_bytes()))

"""An SSH server for tests, on the loopback interface: ``ssh_server.py KEY``; prints its port."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE

import asyncssh


async def shell(process: asyncssh.SSHServerProcess[str]) -> None:
    """Run what a client asked for, until it is done or the client is gone."""
    child = await asyncio.create_subprocess_shell(
        process.command or "true", stdin=DEVNULL, stdout=PIPE, stderr=PIPE
    )

    async def copy(source: asyncio.StreamReader, to: asyncssh.SSHWriter[str]) -> None:
        while data := await source.read(4096):
            to.write(data.decode(errors="replace"))

    copying = asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
    gone = asyncio.ensure_future(process.channel.wait_closed())
    await asyncio.wait({copying, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not copying.done():
        child.terminate()
    process.exit(await child.wait())


async def main(key: str) -> None:
    server = await asyncssh.listen(
        "127.0.0.1",
        0,
        server_host_keys=[key],
        authorized_client_keys=f"{key}.pub",
        process_factory=shell,
    )
    print(server.get_port(), flush=True)
    await server.wait_closed()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))

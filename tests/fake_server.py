"""The real HTTP server over a scripted engine, as a process: PACE_S DRAIN_S [DIE_S [TIMEOUT_S]] on its command line.

Prints its port when it serves. Answers are 20 tokens, PACE_S apart; the engine "dies" after DIE_S (0: never); clients
that send no head of a request, or take nothing of an answer, have TIMEOUT_S.
"""

from __future__ import annotations

import asyncio
import sys

from septet.serve.app import Service, Settings, bind, serve_forever
from tests.fakes import FakeClient, session


async def main(pace_s: float, drain_s: float, die_after_s: float = 0, timeout_s: float = 30) -> int:
    client = FakeClient("x" * 20)
    client.pause = lambda: asyncio.sleep(pace_s)
    sock = bind("127.0.0.1", 0)

    def ready() -> None:
        print(sock.getsockname()[1], flush=True)
        if die_after_s:
            asyncio.get_running_loop().call_later(die_after_s, setattr, client, "dead", True)

    settings = Settings(drain_s=drain_s, head_timeout_s=timeout_s, write_timeout_s=timeout_s)
    return await serve_forever(Service(session(client), settings), sock, ready)


if __name__ == "__main__":
    sys.exit(asyncio.run(main(*map(float, sys.argv[1:]))))

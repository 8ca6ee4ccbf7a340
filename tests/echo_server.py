"""The real HTTP server over a real engine process without a model, as a process: JSON options on its command line.

`model`: "echo:VOCABULARY:STEP_MS"; `restart`: start the engine again; `engine`, `settings`: fields of EngineConfig and
Settings; `keys`: plain API keys; `access_log_file`. Prints its port and the engine's pid when it serves.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from septet.config import EngineConfig
from septet.engine.client import ProcessClient
from septet.serve.access_log import AccessLog
from septet.serve.app import Service, Settings, bind, serve_forever
from septet.serve.keys import Keys
from septet.serve.restart import RestartedModel
from septet.session.session import Limits, Session
from tests.fakes import ByteTokenizer, PlainTemplate


async def main(options: dict[str, Any]) -> int:
    config = EngineConfig(model=options.get("model", "echo:256:20"), **options.get("engine", {}))

    async def start() -> Session:
        client = await ProcessClient.start(config)
        limits = Limits(client.info.max_model_len, 256)
        return Session(client, ByteTokenizer(), PlainTemplate(), "echo", limits)  # type: ignore[arg-type]

    sock = bind("127.0.0.1", 0)
    session = await start()
    models = RestartedModel(session, ["echo"], start) if options.get("restart") else None
    keys = Keys.load(None, options.get("keys", []))
    service = Service(models or session, Settings(**options.get("settings", {})), keys)
    if "access_log_file" in options:
        service.access_log = AccessLog("json", options["access_log_file"])

    def ready() -> None:
        print(sock.getsockname()[1], session.client.info.pid, flush=True)

    try:
        return await serve_forever(service, sock, ready)
    finally:
        if service.access_log is not None:
            service.access_log.close()
        await (models or session).close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(json.loads(sys.argv[1]))))

"""`python -m septet.engine --fd N`: the engine process, started by `EngineProcess.spawn` and by nobody else.

Owns the order of the first and last things: no garbage is looked for before the loop has its own rule (`chores.py`),
as imports leave none worth a fifth of their time; the libraries are not taken down at the end, as nobody needs that.
"""

from __future__ import annotations

import gc

gc.disable()

import argparse  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402

from septet import log  # noqa: E402
from septet.engine.process import serve  # noqa: E402
from septet.engine.pulse import SharedPulse  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m septet.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited, connected stream socket")
    parser.add_argument("--pulse", type=int, help="an inherited descriptor of memory to write signs of life to")
    parser.add_argument("--warm", action="store_true", help="a model will be asked for: load its libraries")
    given = parser.parse_args()
    log.configure(os.environ.get("SEPTET_LOG_LEVEL", "INFO"))
    return serve(given.fd, SharedPulse(given.pulse) if given.pulse is not None else None, warm=given.warm)


def end(code: int) -> None:
    """Leave at once."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())

"""`python -m septet.engine --fd N`: the engine process, started by `EngineProcess.spawn` and by nobody else.

Owns the order of the first things: signals and logging before any heavy import.
"""

from __future__ import annotations

import argparse
import os
import sys

from septet import log
from septet.engine.process import serve
from septet.engine.pulse import SharedPulse


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m septet.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="an inherited, connected stream socket")
    parser.add_argument("--pulse", type=int, help="an inherited descriptor of memory to write signs of life to")
    given = parser.parse_args()
    log.configure(os.environ.get("SEPTET_LOG_LEVEL", "INFO"))
    return serve(given.fd, SharedPulse(given.pulse) if given.pulse is not None else None)


if __name__ == "__main__":
    sys.exit(main())

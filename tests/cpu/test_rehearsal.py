"""Which kernels the first steps need is found without a GPU, without memory and without a launch, and they compile.

In a process of its own: the kernels of a test process may be interpreted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from septet.bench.shapes import SHAPES

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class NoCard:  # a Hopper that can't run anything
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

driver.set_active(NoCard())
from septet.engine.buckets import Shapes
from septet.engine.rehearsal import Rehearsal, needed_kernels
from septet.hub.model_config import read_model_config
from septet.kernels.triton import TritonOps

config = read_model_config(Path(sys.argv[1]))
shapes = Shapes.of(16, 512, 256)
needed = needed_kernels(config, TritonOps(), torch.bfloat16, shapes, shapes.first())
names = [kernel.__name__ for kernel, _ in needed]
store = Path(sys.argv[2])
import os
os.environ["TRITON_CACHE_DIR"] = str(store)
few = dict(zip(names, needed))  # one of each kind: compiling all would take a minute
import septet.engine.rehearsal as rehearsal
kept = [few[name] for name in ("_norm_kernel", "_place_kernel", "_embed_kernel")]
rehearsal.needed_kernels = lambda *args: kept if args[-1] == shapes.usual() else kept[:2]
behind = Rehearsal(config, TritonOps(), torch.bfloat16, shapes, store)
first = behind.finish()
early = [behind.over()]
behind.go_on()
behind._later.result()
early.append(behind.over())
compiled = len(list(store.rglob("*.cubin")))
again = Rehearsal(config, TritonOps(), torch.bfloat16, shapes, store)
second = again.finish()
again.go_on()
early.append(again.over())
left = needed_kernels(config, TritonOps(), torch.bfloat16, shapes, shapes.first())  # those were not launched
rehearsal.needed_kernels = lambda *args: 1 / 0
failing = Rehearsal(config, TritonOps(), torch.float16, shapes, store)
third = failing.finish()
got = {"names": names, "first": first, "compiled": compiled, "second": second, "third": third, "over": early}
got |= {"left": len(left), "compiler": "torch._dynamo" in sys.modules}
print(json.dumps(got))
"""


def test_the_kernels_of_the_first_steps(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["1b"]))
    (tmp_path / "store").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert {"_attention_kernel", "_gemv_kernel", "_decode_kernel", "_norm_kernel", "_embed_kernel"} <= set(got["names"])
    assert (got["first"], got["compiled"]) == (2, 3), "two for the first steps, one behind traffic"
    assert got["second"] == 0, "what was rehearsed once is read from the store"
    assert got["over"] == [False, True, True]
    assert got["third"] == 0
    assert 0 < got["left"] < len(got["names"]), (
        "what is compiled is neither noted again nor run on tensors of no memory"
    )
    assert not got["compiler"], "torch's own compiler takes seconds to import"
    assert "not all kernels could be compiled ahead: ZeroDivisionError" in done.stderr

"""Which kernels the first steps need is found without a GPU, without memory and without a launch, and they compile.

In processes of their own: the kernels of a test process may be interpreted.
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
import json, os, sys
from pathlib import Path
import torch
from triton import knobs
from triton.runtime import JITFunction, driver
from septet.engine.workshop import NoCard

driver.set_active(NoCard(90))  # a Hopper that can't run anything
import septet.engine.rehearsal as rehearsal
from septet.engine import compilers
from septet.engine.buckets import Shapes
from septet.engine.rehearsal import Rehearsal, needed_kernels
from septet.hub.model_config import read_model_config
from septet.kernels.triton import TritonOps

config = read_model_config(Path(sys.argv[1]))
store = Path(sys.argv[2])
os.environ["TRITON_CACHE_DIR"] = str(store)
shapes = Shapes.of(16, 512, 256)
needed = needed_kernels(config, TritonOps(), torch.bfloat16, shapes, shapes.first())
names = [kernel.__name__ for kernel, _ in needed]
few = dict(zip(names, needed))  # one of each kind: compiling all would take a minute
norm, place, embed, act = [few[f"_{name}_kernel"] for name in ("norm", "place", "embed", "gated_act")]

# Another process compiles; a launch here finds that, by whatever key it looks for.
others = compilers.Compilers(2)
others.target(90)
broken = others.tell(place[0], place[1].replace('"name": "', '"name": "no_'))
job = others.tell(*embed)
over = set(others.finish())
by_others = [job in over, broken in over, others.late, len(list(store.rglob("*.cubin")))]
others.close()
launchers = len([*store.rglob("__triton_launcher*.so"), *store.rglob("cuda_utils*.so")])
met = []
knobs.compilation.listener = lambda src, cache_hit, **more: met.append([src.name, cache_hit])
run = JITFunction.run
JITFunction.run = lambda self, *args, warmup, **more: run(self, *args, warmup=True, **more)
ids, table = torch.empty(16, dtype=torch.int64, device="meta"), torch.empty(config.vocab_size, config.hidden_size,
                                                                            dtype=torch.bfloat16, device="meta")
TritonOps().embed(ids, table)
JITFunction.run = run
knobs.compilation.listener = None

def some(*args):
    *_, steps, tell = args
    chosen = [norm, place, act] if steps == shapes.usual() else [norm, place]
    for one in chosen:
        tell(*one)
    return chosen

rehearsal.needed_kernels = some
behind = Rehearsal(config, TritonOps(), torch.bfloat16, shapes, store)
first = behind.finish()
early = [behind.over()]
compilers._Early.compilers = gone = compilers.Compilers(1)  # the processes may end at any time
gone.close()
rehearsal.Compilers = lambda *args: compilers.take()
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
compilers.take = lambda: gone
third = Rehearsal(config, TritonOps(), torch.float16, shapes, store).finish()
got = {"names": names, "first": first, "compiled": compiled, "second": second, "third": third, "over": early}
got |= {"left": len(left), "compiler": "torch._dynamo" in sys.modules, "by_others": by_others, "met": met}
print(json.dumps(got | {"launchers": launchers}))
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
    assert got["by_others"] == [True, True, False, 1], "a job that fails is over as well, and gives nothing"
    assert got["met"] == [["_embed_kernel", True]], "what another process has compiled is not compiled again"
    assert (got["first"], got["compiled"]) == (2, 4), "two for the first steps, one behind traffic, one by itself"
    assert got["second"] == 0, "what was rehearsed once is read from the store"
    assert got["over"] == [False, True, True]
    assert got["third"] == 0
    assert 0 < got["left"] < len(got["names"]), (
        "what is compiled is neither noted again nor run on tensors of no memory"
    )
    assert not got["compiler"], "torch's own compiler takes seconds to import"
    assert "not all kernels could be compiled ahead: ZeroDivisionError" in done.stderr

"""The Python API as a script uses it: no `__main__` guard, no close; the engine goes with the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
from septet import LLM, SamplingParams
llm = LLM("smollm2", max_model_len=256)
ask = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
greedy = SamplingParams(temperature=0, max_tokens=8, logprobs=0)
(answer,) = llm.chat(ask, greedy)
assert answer.outputs[0].text == "The capital of France is Paris.", answer
assert answer.outputs[0].finish_reason == "stop"
assert answer.outputs[0].cumulative_logprob < 0
batch = llm.generate(["1, 2, 3, 4, 5,", answer.prompt_token_ids], [SamplingParams(temperature=0, max_tokens=3), greedy])
assert "6" in batch[0].outputs[0].text, batch[0]
assert batch[1].outputs[0].token_ids == answer.outputs[0].token_ids
assert batch[1].num_cached_tokens >= len(answer.prompt_token_ids) - 1
print(llm._session.client.info.pid)
"""


def test_a_plain_script(smollm2_path: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    engine = int(done.stdout)
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{engine}"):
        assert time.monotonic() < deadline, "the engine outlives its script"
        time.sleep(0.1)

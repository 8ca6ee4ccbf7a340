"""Masked draws on a GPU: captured steps give the answers of eager ones, forced chunks and free rows beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from septet.structured import Structured
from tests.cpu.test_constraints import SCHEMA, many, model, with_engine

if TYPE_CHECKING:
    from pathlib import Path

    from septet.engine.client import InlineClient
    from septet.engine.messages import Update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is there")]
assert model  # the fixture


@pytest.mark.parametrize("forced", [False, True])
def test_captured_masks_give_what_eager_ones_give(model: Path, forced: bool) -> None:
    wanted = [Structured.json_schema(SCHEMA) if i % 4 else None for i in range(8)]
    masked: list[int] = []

    def work(captured: bool) -> Any:
        async def run(client: InlineClient) -> list[tuple[bytes, Update]]:
            runner = client.loop.executor.runner  # type: ignore[attr-defined]
            if captured:
                while runner.graphs.spare(busy=False):
                    pass
                masked.clear()
                put = runner.graphs.machine.masks.set
                runner.graphs.machine.masks.set = lambda masks: (masked.append(masks is not None), put(masks))
            else:
                runner.graphs = None
            return await many(wanted)(client)

        return run

    options = {"device": "cuda", "kernels": "triton", "overlap": "on", "forced": forced}
    eager = [text for text, _ in with_engine(model, work(False), **options)]
    captured = [text for text, _ in with_engine(model, work(True), **options)]
    assert captured == eager
    assert sum(masked) > 10, "no captured draw was masked: the test shows nothing"

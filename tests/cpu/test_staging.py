"""The way to the device: what is sent arrives as it was, whatever the host does next, and no step waits on the way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from septet.engine.staging import Staging, floats, on_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
def test_parts_arrive_in_order_and_keep_their_values(device: str) -> None:
    staging = Staging(torch.device(device))
    source = np.arange(5, dtype=np.int64)
    sent = [staging.send([source + i, np.array([], dtype=np.int64), floats([0.1 * i, -1e300])]) for i in range(50)]
    source[:] = -1
    for i, (first, empty, numbers) in enumerate(sent):
        assert first.tolist() == [i, i + 1, i + 2, i + 3, i + 4]
        assert empty.tolist() == []
        assert numbers.view(torch.float64).tolist() == [0.1 * i, -1e300]


@pytest.mark.parametrize("device", DEVICES)
def test_a_short_list_on_the_device(device: str) -> None:
    assert on_device((), torch.int64, torch.device(device)).tolist() == []
    values = on_device([0.5, -2], torch.float32, torch.device(device))
    assert (values.dtype, values.tolist(), values.device.type) == (torch.float32, [0.5, -2.0], device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_send_neither_waits_for_the_device_nor_is_overwritten_while_the_device_is_behind() -> None:
    device = torch.device("cuda")
    staging, busy = Staging(device), torch.ones(4096, 4096, device=device)
    torch.cuda.synchronize()
    for _ in range(200):
        busy = busy @ busy * 0.0 + 1.0
    behind = torch.cuda.Event()
    behind.record()
    sent = [staging.send([np.full(1000, i, dtype=np.int64)])[0] for i in range(64)]
    listed = on_device([1, 2, 3], torch.int64, device)
    assert not behind.query(), "the sends waited for the products before them"
    assert [int(t[0]) for t in sent] == [int(t[-1]) for t in sent] == list(range(64))
    assert listed.tolist() == [1, 2, 3]

"""negatives on a real GPU: the ids of the CPU, and what only a GPU can show."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.ops.test_negatives import DISTRIBUTIONS, build
from torchrec_pt.data.jagged import Jagged

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("num_draws", [1, 4, 257])
@pytest.mark.parametrize("excluding", [False, True])
def test_ids_are_those_of_the_cpu(distribution: str, num_draws: int, excluding: bool) -> None:
    sampler = build(distribution, 5000, num_draws, seed=7)
    exclude = None
    if excluding:
        exclude = Jagged.from_lengths(torch.arange(100).repeat(300), torch.full((300,), 100))
    on_cpu = sampler.sample(300, step=3, exclude=exclude)
    on_gpu = sampler.sample(
        300, step=3, exclude=exclude and exclude.to(torch.device("cuda")), device="cuda"
    )
    assert torch.equal(on_gpu.ids.cpu(), on_cpu.ids)
    torch.testing.assert_close(on_gpu.log_q.cpu(), on_cpu.log_q)  # the logarithm is the device's


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_unique_ids_are_those_of_the_cpu(distribution: str) -> None:
    sampler = build(distribution, 500, 200)
    on_cpu = sampler.sample_shared(step=1, unique=True)
    on_gpu = sampler.sample_shared(step=1, unique=True, device="cuda")
    assert torch.equal(on_gpu.ids.cpu(), on_cpu.ids)
    torch.testing.assert_close(on_gpu.log_q.cpu(), on_cpu.log_q)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_nothing_waits_for_the_device(distribution: str) -> None:
    sampler = build(distribution, 5000, 64)
    rows = torch.arange(300, device="cuda")
    sampler.sample(rows, step=0)  # copies the table
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(rows, step=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_draws_run_on_the_current_stream() -> None:
    sampler = build("unigram", 5000, 64)
    rows, late = torch.arange(300, device="cuda"), torch.zeros(300, device="cuda").long()
    expected = sampler.sample(rows, step=0).ids
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whoever does not wait for it sees zeros
        late.copy_(rows)
        ids = sampler.sample(late, step=0).ids
    stream.synchronize()
    assert torch.equal(ids, expected)


BAD = """
import torch
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.ops import NegativeSampler

exclude = Jagged(torch.tensor({values}), torch.tensor([0, {num}])).to(torch.device("cuda"))
NegativeSampler(5, 3).sample(1, step=0, exclude=exclude, device="cuda")
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(
    ("values", "condition"),
    [([2, 1], "last < item"), ([5], "last < item"), ([0, 1, 2, 3, 4], "some item must be left")],
)
def test_exclusions_that_are_none_stop_the_process(values: list[int], condition: str) -> None:
    command = [sys.executable, "-c", BAD.format(values=values, num=len(values))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert condition in done.stderr

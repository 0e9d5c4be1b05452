"""The data that programs are tried on, in one process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.programs.answers import rich_data
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks


@pytest.fixture(scope="module", autouse=True)
def ranks() -> Iterator[None]:
    with joined_ranks():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return rich_data(tmp_path_factory.mktemp("rich"))

"""Data whose held-out rows lie anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import FEATURES, tiny_config
from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.prepare import prepare


@pytest.fixture(scope="package")
def scattered(cycle_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    """Validation and test rows anywhere between the training rows of a user."""
    out = tmp_path_factory.mktemp("scattered") / "prepared"
    data = tiny_config(cycle_folder, FEATURES).data
    split = {"rule": "ratio", "valid": 0.2, "test": 0.2}
    config = RunConfig.model_validate(
        {"run_dir": out, "data": {**data.model_dump(), "split": split}}
    )
    prepare(config.data, out, 0)
    return PreparedDataset.load(out)

"""RecBole's own way from a folder with atomic files to a trainer, in RecBole's environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # RecBole's checkpoints are pickled

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


def build_trainer(
    model_name: str, folder: Path, checkpoints: str, **settings: Any
) -> tuple[Any, Any, Any, Any]:
    """Trainer, and its training, validation and test data; on the CPU, by RecBole's defaults.

    Args:
        folder: with the atomic files of its name.
        checkpoints: a folder for what RecBole writes.
    """
    places = {"data_path": str(folder.resolve().parent), "checkpoint_dir": checkpoints}
    config = Config(model_name, folder.name, config_dict={**settings, **places, "use_gpu": False})
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    return trainer, train, valid, test

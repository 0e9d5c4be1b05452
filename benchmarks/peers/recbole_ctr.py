#!/usr/bin/env python3
"""RecBole's DeepFM, DCN-v2 or AutoInt on what export_recbole.py wrote, with RecBole's defaults.

    python benchmarks/peers/recbole_ctr.py /tmp/ctr-seed0 --model DeepFM --seed 0

In an environment of its own: pip install torch==2.13.0 "numpy<2" scipy "pandas<3" tqdm
scikit-learn pyyaml tensorboard tabulate plotly texttable psutil joblib colorlog==4.7.2
colorama==0.4.4, then with --no-deps recbole==1.2.1 thop. Trains until AUC on valid has not grown
for ten epochs; AUC and logloss are those of the best epoch on test.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # RecBole's checkpoints are pickled

from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

MODELS = ("DeepFM", "DCNV2", "AutoInt")


def build_trainer(
    folder: Path, model_name: str, seed: int, checkpoints: str
) -> tuple[Any, Any, Any, Any]:
    """Trainer, training, validation and test data."""
    settings = {
        "data_path": str(folder.resolve().parent),
        "benchmark_filename": ["train", "valid", "test"],
        "load_col": {
            "inter": ["user_id", "item_id", "label"],
            "user": ["user_id", "age", "gender", "occupation"],
            "item": ["item_id", "release_year", "class"],
        },
        "seed": seed,
        "checkpoint_dir": checkpoints,
        "use_gpu": False,
    }
    config = Config(model_name, folder.name, config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    model = get_model(config["model"])(config, train.dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    return trainer, train, valid, test


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, default="DeepFM")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer, train, valid, test = build_trainer(
            arguments.folder, arguments.model, arguments.seed, checkpoints
        )
        started = time.process_time()
        trainer.fit(train, valid, verbose=False, show_progress=False)
        seconds = time.process_time() - started
        found = trainer.evaluate(test, load_best_model=True, show_progress=False)
    reached = {name: float(value) for name, value in found.items()}
    run = {"model": arguments.model, "seed": arguments.seed, "epochs": len(trainer.train_loss_dict)}
    print(json.dumps({**run, **reached, "cpu_seconds": round(seconds)}))


if __name__ == "__main__":
    main()

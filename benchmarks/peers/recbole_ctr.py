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
import tempfile
import time
from pathlib import Path
from typing import Any

from recbole_trainer import build_trainer

MODELS = ("DeepFM", "DCNV2", "AutoInt")


def build_ctr_trainer(
    folder: Path, model_name: str, seed: int, checkpoints: str
) -> tuple[Any, Any, Any, Any]:
    """Of `build_trainer`, on the splits that stand in the folder."""
    return build_trainer(
        model_name,
        folder,
        checkpoints,
        benchmark_filename=["train", "valid", "test"],
        load_col={
            "inter": ["user_id", "item_id", "label"],
            "user": ["user_id", "age", "gender", "occupation"],
            "item": ["item_id", "release_year", "class"],
        },
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, default="DeepFM")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as checkpoints:
        trainer, train, valid, test = build_ctr_trainer(
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

#!/usr/bin/env python3
"""surprise's SVD or SVD++ on MovieLens-100K's folds, with its defaults.

    python benchmarks/peers/surprise_rating.py data/ml-100k-folds --model SVDpp --seed 0

In an environment of its own: pip install "numpy<2" scipy "pandas<3" joblib, then with --no-deps
scikit-surprise==1.1.5. The folds are those of scripts/get_ml100k_folds.py; training is all of
base, with the rows that torchrec_pt validates on. surprise does not shuffle, so the order of the
rows counts: on u1 the RMSE of SVD++ is .9247 in the order of u.data, as here, .9330 in u1.base's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import surprise

FOLDS = ("u1", "u2", "u3", "u4", "u5")
MODELS = {"SVD": surprise.SVD, "SVDpp": surprise.SVDpp, "BaselineOnly": surprise.BaselineOnly}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folds", type=Path)
    parser.add_argument("--model", choices=MODELS, default="SVDpp")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    found = []
    for fold in FOLDS:
        rows = pd.read_csv(arguments.folds / fold / "ml-100k.inter", sep="\t")
        rows.columns = [name.split(":")[0] for name in rows.columns]
        ratings, is_test = rows[["user_id", "item_id", "rating"]], rows["split"] == "test"
        train = surprise.Dataset.load_from_df(ratings[~is_test], surprise.Reader())
        random = {} if arguments.model == "BaselineOnly" else {"random_state": arguments.seed}
        model = MODELS[arguments.model](**random)
        started = time.process_time()
        model.fit(train.build_full_trainset())
        seconds = time.process_time() - started
        test = list(ratings[is_test].itertuples(index=False, name=None))
        errors = np.array([true - guess for _, _, true, guess, _ in model.test(test)])
        reached = {"rmse": float((errors**2).mean() ** 0.5), "mae": float(abs(errors).mean())}
        found.append(reached)
        run = {"model": arguments.model, "seed": arguments.seed, "fold": fold}
        print(json.dumps({**run, **reached, "cpu_seconds": round(seconds, 1)}), flush=True)
    mean = {name: float(np.mean([each[name] for each in found])) for name in ("rmse", "mae")}
    print(json.dumps({"model": arguments.model, "seed": arguments.seed, "fold": "mean", **mean}))


if __name__ == "__main__":
    main()

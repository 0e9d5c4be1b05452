#!/usr/bin/env python3
"""implicit's ALS on MovieLens-100K, leave-one-out by time, over the full catalogue.

    python benchmarks/peers/implicit_ml100k.py data/ml-100k/ml-100k.inter --seed 0

In an environment of its own: pip install "numpy<2" scipy "pandas<3" tqdm threadpoolctl, then with
--no-deps implicit==0.7.3. A user's vector at the test is made of all that came before it, the
validation item too; what the user took before is no candidate.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
from implicit.als import AlternatingLeastSquares
from leave_one_out import K, metrics, read
from scipy.sparse import csr_matrix


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inter")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = read(arguments.inter)
    rows["user"] = rows["user_id"].astype("category").cat.codes
    rows["item"] = rows["item_id"].astype("category").cat.codes
    shape = (rows["user"].max() + 1, rows["item"].max() + 1)

    def matrix(from_end: int) -> csr_matrix:
        some = rows[rows["from_end"] >= from_end]
        return csr_matrix((np.ones(len(some), np.float32), (some["user"], some["item"])), shape)

    model = AlternatingLeastSquares(
        factors=64, regularization=10.0, random_state=arguments.seed, num_threads=1
    )
    model.fit(matrix(2), show_progress=False)
    users = np.arange(shape[0])
    found, _ = model.recommend(users, matrix(1), N=K, recalculate_user=True)
    test = rows[rows["from_end"] == 0].sort_values("user")["item"].to_numpy()
    _, place = np.nonzero(found == test[:, None])
    print(json.dumps({"model": "als", "seed": arguments.seed, **metrics(place + 1, len(users))}))


if __name__ == "__main__":
    main()

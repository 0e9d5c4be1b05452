"""An atomic file split as torchrec_pt's leave_one_out does, for the peers."""

from __future__ import annotations

import numpy as np
import pandas as pd

K = 10


def read(path: str) -> pd.DataFrame:
    """In time order: user_id, item_id, from_end. Ties, and a log without times, keep its order.

    `from_end`: 0 is a user's last interaction (test), 1 the one before it (validation).
    """
    rows = pd.read_csv(path, sep="\t")
    rows.columns = [name.split(":")[0] for name in rows.columns]
    if "timestamp" in rows:
        rows = rows.sort_values("timestamp", kind="stable", ignore_index=True)
    rows["from_end"] = rows.groupby("user_id").cumcount(ascending=False)
    return rows[["user_id", "item_id", "from_end"]]


def metrics(rank: np.ndarray, num_users: int) -> dict[str, float]:
    """Of the ranks from 1 of the test items that were among the first K."""
    return {
        "hr@10": len(rank) / num_users,
        "ndcg@10": float((1 / np.log2(rank + 1)).sum()) / num_users,
    }

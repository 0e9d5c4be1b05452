"""Training of the ctr task beside RecBole's DCN-v2, on MovieLens-100K: labelled pairs a second.

    python benchmarks/bench_ctr.py [--rounds 5] [--quick]

Ratings of 4 and more are clicks, 8 : 1 : 1 at random, with the features that RecBole takes. One
thread each, epochs of training alone, in turns; RecBole at its defaults in its environment
(`make peers`). A turn is about 80,000 pairs of both.

- DCN-v2, float32 (benchmarks/ctr.toml): the same MLP of 768 and 768 over vectors of 16, which is
  nine tenths of the arithmetic of both, and batches of as many pairs. What differs: two cross
  layers of rank 16 where RecBole has three of full rank; gelu without RecBole's batch norms; no
  vector of the user's own, but the mean and the attention of up to 50 items of the history, and
  factors; batches of users, not of rows.
- DCN-v2, bf16: the same with `precision = "bf16"`, which RecBole's defaults do not have.
- cross, default MLP: the same with the task's own MLP of 128 and 64.
- recipe: configs/ml100k_ctr.toml, a transformer of dim 64 over 100 items and 400 labels a user.

Writes benchmarks/results/ctr.json; of --quick only where --out says.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from bars import at_least, without_bound
from conditions import ROOT, conditions
from contestants import Contestant
from ctr_epochs import DCN_V2, MODELS
from peers.environments import python_of
from turns import parsed, ratios_to, report, take_turns, turns_parser

BENCHMARKS = ROOT / "benchmarks"
PEER = "RecBole DCN-v2"


def main() -> None:
    arguments = parsed(turns_parser(__doc__, "training", rounds=5), "ctr")
    header = conditions("cpu") | {"peer": "RecBole 1.2.1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = Contestant(BENCHMARKS / "ctr_epochs.py", folder)
        sizes = ours.answer()["models"]
        export = [BENCHMARKS / "peers/export_recbole.py", folder / "ctr/prepared"]
        subprocess.run([sys.executable, *export, folder / "recbole"], check=True)
        peer = Contestant(
            BENCHMARKS / "peers/recbole_ctr_epochs.py",
            folder / "recbole",
            python=python_of("recbole"),
            PYTHONPATH=BENCHMARKS,
            PYTHONWARNINGS="ignore",
        )
        sizes[PEER] = peer.answer()
        entrants = {PEER: (peer, "epoch")}
        entrants |= {name: (ours, name) for name in MODELS}
        rows = take_turns(entrants, 1 if arguments.quick else arguments.rounds)
    ratios = ratios_to(rows, PEER)
    bars = [
        at_least("pairs a second over RecBole's DCN-v2", 2, [(ratios[DCN_V2], DCN_V2)]),
        *(without_bound("the same", [(ratios[name], name)]) for name in MODELS if name != DCN_V2),
    ]
    title = "training of ctr"
    report(title, "pairs", rows, bars, arguments, header, models=sizes, ratios=ratios)


if __name__ == "__main__":
    main()

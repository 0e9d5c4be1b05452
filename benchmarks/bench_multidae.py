"""Training of a denoising autoencoder beside RecBole's MultiDAE, on MovieLens-100K: users a second.

    python benchmarks/bench_multidae.py [--rounds 5] [--quick]

Both 1682-600-64-600-1682, tanh between, half of a user's items dropped, multinomial loss over the
catalogue, Adam, 100 users a batch, one thread; epochs of training alone, in turns; RecBole in its
environment (`make peers`). What differs: ours reads a history as a bag of item rows and never
makes a matrix of users by items of it; RecBole has a tanh behind its 64, too, and biases of all
its layers.

Writes benchmarks/results/multidae.json; of --quick only where --out says.
"""

from __future__ import annotations

import tempfile

from bars import at_least
from conditions import ROOT, conditions
from contestants import Contestant
from multidae_epochs import EPOCHS_A_TURN
from peers.environments import python_of
from turns import parsed, ratios_to, report, take_turns, turns_parser

BENCHMARKS = ROOT / "benchmarks"
OURS, PEER = "ours", "RecBole MultiDAE"


def main() -> None:
    arguments = parsed(turns_parser(__doc__, "training", rounds=5), "multidae")
    header = conditions("cpu") | {"peer": "RecBole 1.2.1"}
    with tempfile.TemporaryDirectory() as folder:
        ours = Contestant(BENCHMARKS / "multidae_epochs.py", folder)
        peer = Contestant(
            BENCHMARKS / "peers/recbole_multidae.py",
            ROOT / "data/ml-100k",
            EPOCHS_A_TURN,
            python=python_of("recbole"),
            PYTHONPATH=BENCHMARKS,
            PYTHONWARNINGS="ignore",
        )
        sizes = {OURS: ours.answer(), PEER: peer.answer()}
        entrants = {PEER: (peer, "epochs"), OURS: (ours, "epochs")}
        rows = take_turns(entrants, 1 if arguments.quick else arguments.rounds)
    ratios = ratios_to(rows, PEER)
    bars = [at_least("users a second over RecBole's MultiDAE", 1, [(ratios[OURS], OURS)])]
    title = "training of an autoencoder"
    report(title, "users", rows, bars, arguments, header, models=sizes, ratios=ratios)


if __name__ == "__main__":
    main()

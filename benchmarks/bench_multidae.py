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
from dataclasses import asdict

import torch
from bars import at_least, bar_table
from conditions import ROOT, build_parser, conditions, default_out, write_json
from contestants import Contestant
from multidae_epochs import EPOCHS_A_TURN
from peers.environments import python_of
from rich.console import Console
from turns import ratios_to, take_turns, turns_table

BENCHMARKS = ROOT / "benchmarks"
OURS, PEER = "ours", "RecBole MultiDAE"


def main() -> None:
    parser = build_parser(__doc__, ("training",), rounds_help="turns of each that count")
    parser.set_defaults(device="cpu")
    arguments = parser.parse_args()
    if arguments.device != "cpu" or arguments.threads != 1:
        parser.error("--device, --threads: this benchmark is of one thread on the CPU")
    if arguments.out is None and not arguments.quick:
        arguments.out = default_out("multidae")
    torch.set_num_threads(1)
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
        for contestant in (ours, peer):
            contestant.close()
            contestant.wait()
    ratios = ratios_to(rows, PEER)
    bars = [at_least("users a second over RecBole's MultiDAE", 1, [(ratios[OURS], OURS)])]
    console = Console(width=max(Console().width, 120))
    console.print(turns_table("training of an autoencoder", "users", rows))
    console.print(bar_table(bars))
    if arguments.out is not None:
        found = {
            "models": sizes,
            "bars": [asdict(bar) for bar in bars],
            "ratios": ratios,
            "rows": [asdict(row) for row in rows],
        }
        write_json(arguments.out, header, found)


if __name__ == "__main__":
    main()

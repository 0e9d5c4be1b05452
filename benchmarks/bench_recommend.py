"""The best of 1,000,000 items of 64 dimensions: the exact search and the graph, against faiss.

    python benchmarks/bench_recommend.py [--threads 1] [--rounds 5] [--only exact|hnsw]
        [--items N] [--quick]

exact: the 10 best for 256 queries at once, as the Recommender searches and by faiss IndexFlatIP,
in turns; and for one query at a time.
hnsw: one query at a time over the graph, alone and with 100 items that are no candidates, and how
many of the exact 10 best it finds.
Item vectors are normal, with a spectrum that falls off as j^-1/2 (as learned ones' do) and lengths
that vary; "even" is without either, the hardest case for a graph, over a tenth of the items.

Times are CPU time, so that other processes on the machine count for little. Writes
benchmarks/results/recommend.json; with --only the other section stays as it stands in the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
from bars import at_least, at_most, bar_table, without_bound
from conditions import build_parser, conditions, default_out, write_json
from measuring import elapsed_ms, quantiles, take_turns
from rich.console import Console
from tables import build_table
from torch import Tensor

from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.retrieval import NUM_NEIGHBOURS, WIDTH_OF_SEARCH, GraphSearch
from torchrec_pt.scoring import top_items

NUM_ITEMS, DIM, K, BATCH = 1_000_000, 64, 10, 256
NUM_QUERIES = 500  # one at a time
NUM_SEEN = 100

Found = tuple[Tensor, Tensor]  # ids and scores


class Products:
    """Scores as a Recommender's are, of given item vectors."""

    def __init__(self, vectors: Tensor, ranks: Ranks) -> None:
        self.vectors, self.ranks = vectors, ranks

    def queries(self, users: Tensor) -> Tensor:
        raise NotImplementedError

    def scores(self, queries: Tensor, items: range) -> Tensor:
        return queries @ self.vectors[items.start : items.stop].T

    def search(
        self, queries: Tensor, k: int, seen: Jagged | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return top_items(self, queries, seen, k, len(self.vectors), self.ranks, allowed)


def draw_vectors(num_items: int, is_even: bool) -> tuple[Tensor, Tensor]:
    """(num_items, DIM) of items and (NUM_QUERIES, DIM) of users."""
    draw = torch.Generator().manual_seed(0)
    items = torch.randn(num_items, DIM, generator=draw)
    users = torch.randn(NUM_QUERIES, DIM, generator=draw)
    if not is_even:
        spectrum = torch.arange(1, DIM + 1).pow(-0.5)
        lengths = torch.randn(num_items, 1, generator=draw).mul(0.3).exp()
        items, users = items * spectrum * lengths, users * spectrum
    return items, users


def measure_exact(num_items: int, rounds: int, ranks: Ranks) -> dict[str, object]:
    items, users = draw_vectors(num_items, is_even=False)
    products, batch = Products(items, ranks), users[:BATCH]
    flat = faiss.IndexFlatIP(DIM)
    flat.add(items.numpy())
    own, _ = products.search(batch, K, None, None)
    _, others = flat.search(batch.numpy(), K)
    times = take_turns(
        {
            "torchrec_pt": lambda: products.search(batch, K, None, None),
            "faiss IndexFlatIP": lambda: flat.search(batch.numpy(), K),
        },
        {"torchrec_pt": rounds, "faiss IndexFlatIP": rounds},
        "cpu",
    )
    singles = users.split(1)[: 20 * rounds]
    alone = take_turns(
        {
            "torchrec_pt": one_by_one(products, singles),
            "faiss IndexFlatIP": one_by_one_in_faiss(flat, singles),
        },
        {"torchrec_pt": len(singles), "faiss IndexFlatIP": len(singles)},
        "cpu",
    )
    return {
        "num_items": num_items,
        "same_items_as_faiss": overlap(own, torch.from_numpy(others)),
        "batch_ms": {name: quantiles(each) for name, each in times.items()},
        "one_ms": {name: latency(each) for name, each in alone.items()},
    }


def one_by_one(products: Products, queries: tuple[Tensor, ...]) -> partial[object]:
    left = iter(queries)
    return partial(lambda: products.search(next(left), K, None, None))


def one_by_one_in_faiss(flat: faiss.IndexFlatIP, queries: tuple[Tensor, ...]) -> partial[object]:
    left = iter(queries)
    return partial(lambda: flat.search(next(left).numpy(), K))


def measure_graph(num_items: int, is_even: bool, ranks: Ranks) -> dict[str, object]:
    items, users = draw_vectors(num_items, is_even)
    products = Products(items, ranks)
    built: list[GraphSearch] = []
    build_ms = elapsed_ms(lambda: built.append(GraphSearch(items, products)), "cpu")
    graph = built[0]
    best, _ = products.search(users, K + NUM_SEEN, None, None)
    one_row = torch.tensor([0, NUM_SEEN])
    found: dict[str, object] = {
        "num_items": num_items,
        "vectors": "even" if is_even else "of a falling spectrum",
        "build_s": round(build_ms / 1000, 1),
    }
    for name, num_seen in (("all", 0), ("100 seen", NUM_SEEN)):
        times: list[float] = []
        lists: list[Found] = []
        for query, row in zip(users.split(1), best, strict=True):
            seen = Jagged(row[:num_seen], one_row) if num_seen else None  # the very best
            search = partial(graph.search, query, K, seen, None)
            times.append(elapsed_ms(partial(keep, search, lists), "cpu"))
        recall = overlap(torch.cat([ids for ids, _ in lists]), best[:, num_seen : num_seen + K])
        found[name] = {"recall": recall, "ms": latency(times)}
    return found


def keep(search: Callable[[], Found], found: list[Found]) -> None:
    found.append(search())


def latency(times: list[float]) -> dict[str, float]:
    p50, p99 = np.quantile(times, (0.5, 0.99))
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}


def overlap(found: Tensor, right: Tensor) -> float:
    """The mean share of each row of `right` that the row of `found` holds."""
    is_hit = (found.unsqueeze(2) == right.unsqueeze(1)).any(2)
    return round(float(is_hit.double().mean()), 4)


def main() -> None:
    parser = build_parser(__doc__, ("exact", "hnsw"), rounds_help="of the batch of 256")
    parser.add_argument("--items", type=int, default=NUM_ITEMS)
    arguments = parser.parse_args()
    if arguments.device != "cpu":
        parser.error("--device: this benchmark is of the CPU alone")
    torch.set_num_threads(arguments.threads)
    faiss.omp_set_num_threads(arguments.threads)
    num_items = 20_000 if arguments.quick else arguments.items
    out: Path | None = arguments.out
    if out is None and not arguments.quick:
        out = default_out("recommend")
    console = Console(width=max(Console().width, 120))
    header = conditions("cpu")
    found: dict[str, object] = {}
    if arguments.only and out is not None and out.with_suffix(".json").exists():
        stands = json.loads(out.with_suffix(".json").read_text())
        found = {name: stands[name] for name in ("exact", "hnsw") if name in stands}
    with joined_ranks() as ranks:
        if arguments.only in (None, "exact"):
            found["exact"] = measure_exact(num_items, arguments.rounds, ranks) | {"header": header}
        if arguments.only in (None, "hnsw"):
            sizes = {False: num_items, True: num_items // 10}
            graphs = [measure_graph(size, even, ranks) for even, size in sizes.items()]
            found["hnsw"] = {
                "num_neighbours": NUM_NEIGHBOURS,
                "width_of_search": WIDTH_OF_SEARCH,
                "graphs": graphs,
                "header": header,
            }
    report(found, console)
    if out is not None:
        write_json(out, header, found)


def report(found: dict[str, object], console: Console) -> None:
    bars = []
    exact: dict[str, object] | None = found.get("exact")  # type: ignore[assignment]
    if exact is not None:
        where = f"{exact['num_items']:,} items, {BATCH} queries"
        medians = {name: each[1] for name, each in exact["batch_ms"].items()}
        ratio = medians["torchrec_pt"] / medians["faiss IndexFlatIP"]
        bars += [
            at_most("exact top 10, time over that of IndexFlatIP", 1.0, [(ratio, where)]),
            at_least("share of its items", 0.999, [(exact["same_items_as_faiss"], where)]),
        ]
        table = build_table(
            "exact",
            "search",
            "256: p20",
            "p50",
            "p80 ms",
            "one: p50",
            "p99 ms",
            text_columns=("search",),
        )
        for name, each in exact["batch_ms"].items():
            one = exact["one_ms"][name]
            table.add_row(name, *map(str, each), str(one["p50"]), str(one["p99"]))
        console.print(table)
    if "hnsw" in found:
        table = build_table(
            "hnsw",
            "vectors",
            "items",
            "build s",
            "candidates",
            "recall@10",
            "p50",
            "p99 ms",
            text_columns=("vectors", "candidates"),
        )
        for graph in found["hnsw"]["graphs"]:
            for name in ("all", "100 seen"):
                each = graph[name]
                where = f"{graph['num_items']:,} items, {graph['vectors']}, {name}"
                bars.append(without_bound("recall@10 of the graph", [(each["recall"], where)]))
                table.add_row(
                    graph["vectors"],
                    f"{graph['num_items']:,}",
                    str(graph["build_s"]),
                    name,
                    str(each["recall"]),
                    str(each["ms"]["p50"]),
                    str(each["ms"]["p99"]),
                )
        console.print(table)
    console.print(bar_table(bars))
    found["bars"] = [asdict(bar) for bar in bars]


if __name__ == "__main__":
    main()

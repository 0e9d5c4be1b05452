"""MovieLens-100K with some items and some users held out whole, and what ranks without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

Floats = npt.NDArray[np.float64]
LOG_HEAD = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM_HEAD = "item_id:token\tclass:token_seq\trelease_year:token_seq\tmovie_title:token_seq"
NUMBERS = ("user_id", "item_id", "rating", "timestamp")
CONTENT = ("class", "release_year", "movie_title")


@dataclass(frozen=True)
class ColdSplit:
    """What a model may learn from, and what it is asked.

    Attributes:
        items: all items, with their content as lists of words.
        log: user, item and time of the training's users and items, by time.
        cold_items: ids that `log` has none of, though users took them.
        taken: of each of the log's users, the cold items they took.
        cold_users: of each user who is not in the log, the warm items they took, by time.
    """

    items: pl.DataFrame
    log: pl.DataFrame
    cold_items: list[int]
    taken: dict[int, list[int]]
    cold_users: dict[int, list[int]]


def split_log(data: Path, seed: int, share: float) -> ColdSplit:
    """Hold out a share of the items and of the users, drawn by the seed."""
    log = _read(data / "ml-100k.inter").sort("timestamp", "user_id", "item_id")
    words = pl.col("class", "movie_title").str.to_lowercase().str.extract_all(r"[\w'-]+")
    items = _read(data / "ml-100k.item").with_columns(words, pl.concat_list("release_year"))
    draw = np.random.default_rng(seed)

    def drawn(ids: pl.Series) -> list[int]:
        return sorted(draw.choice(ids.to_numpy(), int(share * len(ids)), replace=False).tolist())

    cold_items, users = drawn(items["item_id"]), drawn(log["user_id"].unique().sort())
    is_cold, is_new = pl.col("item_id").is_in(cold_items), pl.col("user_id").is_in(users)
    training = log.filter(~is_cold, ~is_new)
    is_warm = pl.col("item_id").is_in(training["item_id"].unique().implode())
    return ColdSplit(
        _of_common_words(items, is_warm),
        training,
        cold_items,
        _lists(log.filter(is_cold, ~is_new)),
        _lists(log.filter(is_warm, is_new)),
    )


def _of_common_words(items: pl.DataFrame, is_warm: pl.Expr) -> pl.DataFrame:
    """Without the words that fewer than two warm items have, which tell nothing of others.

    Else a warm item's own words would take it away from all histories, and a new one's would not.
    """
    for name in CONTENT:
        words = items.filter(is_warm)[name].list.unique().explode()
        counts = words.value_counts()
        common = counts.filter(pl.col("count") > 1)[name].implode()
        kept = pl.col(name).list.eval(pl.element().filter(pl.element().is_in(common)))
        items = items.with_columns(kept)
    return items


def write_log(split: ColdSplit, folder: Path) -> None:
    """As RecBole files, with the items' words."""
    folder.mkdir(parents=True)
    words = split.items.select("item_id", pl.col(CONTENT).list.join(" "))
    for name, head, table in (("inter", LOG_HEAD, split.log), ("item", ITEM_HEAD, words)):
        body = table.write_csv(separator="\t", include_header=False, quote_style="never")
        (folder / f"log.{name}").write_text(f"{head}\n{body}")


def _read(file: Path) -> pl.DataFrame:
    table = pl.read_csv(file, separator="\t", quote_char=None, infer_schema=False)
    table = table.rename(lambda name: name.partition(":")[0])
    return table.cast({name: pl.Int64 for name in NUMBERS if name in table.columns})


def _lists(log: pl.DataFrame) -> dict[int, list[int]]:
    """User -> items, by time."""
    grouped = log.group_by("user_id", maintain_order=True).agg("item_id")
    return dict(zip(grouped["user_id"].to_list(), grouped["item_id"].to_list(), strict=True))


# --- what ranks without training ------------------------------------------------------------------


class Baselines:
    """Scores (U, N) of all items, in the order of `split.items`, for U histories of item ids."""

    def __init__(self, split: ColdSplit) -> None:
        self.place = {item: place for place, item in enumerate(split.items["item_id"])}
        counts = dict(split.log["item_id"].value_counts().iter_rows())
        self._counts = np.array([counts.get(item, 0) for item in self.place], dtype=np.float64)
        is_warm = self._counts > 0
        genres = _one_hot(split.items["class"])
        of_genre = (genres[is_warm].T @ self._counts[is_warm]) / genres[is_warm].sum(0).clip(1)
        self._of_genres = genres @ of_genre / genres.sum(1).clip(1)
        content = np.concatenate([_one_hot(split.items[name]) for name in CONTENT], axis=1)
        num_items = content[is_warm].sum(0)  # that have a word
        idf = np.where(num_items > 0, np.log(is_warm.sum() / num_items.clip(1)), 0)
        self._content = {"content kNN": _unit(content), "content kNN, idf": _unit(content * idf)}

    def scores(self, histories: list[list[int]]) -> dict[str, Floats]:
        """popularity: training interactions; of a new item, the mean of those of its genres'
        items, each genre as much. content kNN: mean cosines with the items of the history."""
        popularity = np.where(self._counts > 0, self._counts, self._of_genres)
        took = np.zeros((len(histories), len(self.place)))
        for row, history in enumerate(histories):
            took[row, [self.place[item] for item in history]] = 1 / len(history)
        found = {"popularity": np.tile(popularity, (len(histories), 1))}
        for name, content in self._content.items():
            found[name] = took @ content @ content.T
        return found


def _one_hot(cells: pl.Series) -> Floats:
    words = cells.list.explode().drop_nulls().unique().sort().to_list()
    column = {word: place for place, word in enumerate(words)}
    table = np.zeros((len(cells), len(words)))
    for row, cell in enumerate(cells.to_list()):
        table[row, [column[word] for word in cell or () if word is not None]] = 1
    return table


def _unit(rows: Floats) -> Floats:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)

"""What each test item is ranked against in the sampled protocol: items drawn, or items given.

Sampled metrics may order models otherwise than those over the full catalogue do (Krichene and
Rendle 2020); they are for comparison with papers that report them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from torchrec_pt import rng
from torchrec_pt.config import Candidates
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.errors import DataError
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, gather_integers, raised_together
from torchrec_pt.held_out import HeldOut
from torchrec_pt.ops.negatives import NegativeSampler

ROWS_AT_A_TIME = 1024


def load_candidates(
    config: Candidates, dataset: PreparedDataset, asked: HeldOut, ranks: Ranks
) -> tuple[Jagged, str | None]:
    """The candidates of each asked target, one row a target, and what there is to say of them.

    Every rank calls it, for its own users.

    Raises:
        DataError: a file that cannot be used.
    """
    with raised_together():
        if config.path is not None:
            given, num_amiss = read_candidates(config.path, dataset, asked.users)
            candidates = given.select(asked.targets.rows)
        else:
            assert config.num is not None
            candidates, num_amiss = draw_candidates(dataset, asked, config.num, config.seed)
    num_amiss = sum(num for (num,) in gather_integers([num_amiss], ranks.device))
    if not num_amiss:
        return candidates, None
    if config.path is not None:
        return candidates, (
            f"{config.path}: {num_amiss:,} candidates are not in the catalogue and are left out"
        )
    return candidates, (
        f"{num_amiss:,} users have fewer than {config.num} items that they never took: "
        "each of their test items is ranked among all of these"
    )


# --- drawn --------------------------------------------------------------------------------------


def draw_candidates(
    dataset: PreparedDataset, asked: HeldOut, num: int, seed: int
) -> tuple[Jagged, int]:
    """Of each target `num` distinct items, uniform among those that its user never took.

    They depend on the seed, the user's dense id and the target's place among the user's targets
    alone. What the user took in any split is left out.

    Returns:
        One row a target, in their order, and how many users had fewer than `num` items left:
        these get all of them.
    """
    taken = dataset.history("test").select(asked.users).to_sets()
    num_wanted = (dataset.num_items - taken.lengths).clamp(max=num)
    user_ids, num_targets = dataset.user_ids[asked.users], asked.targets.lengths
    drawn, places = [Jagged.from_lengths(user_ids[:0], user_ids[:0])], [user_ids[:0]]
    for place in range(int(num_targets.max()) if len(num_targets) else 0):
        for rows in torch.nonzero(num_targets > place).squeeze(1).split(ROWS_AT_A_TIME):
            taken_there, wanted = taken.select(rows), num_wanted[rows]
            drawn.append(
                _draw_distinct(user_ids[rows], taken_there, wanted, dataset.num_items, seed, place)
            )
            places.append(asked.targets.offsets[rows] + place)
    return Jagged.stack(drawn).select(torch.cat(places).argsort()), int((num_wanted < num).sum())


def _draw_distinct(
    rows: Tensor, exclude: Jagged, num_wanted: Tensor, num_items: int, seed: int, step: int
) -> Jagged:
    """Of each row its first `num_wanted` distinct draws, in their order.

    Args:
        rows: (R,) int64 as in `NegativeSampler.sample`.
        num_wanted: (R,) int64, no more than the row's items that are not excluded.
    """
    seed = rng.key(seed, "candidates") % 2**32
    left = torch.nonzero(num_wanted > 0).squeeze(1)
    done = [torch.nonzero(num_wanted == 0).squeeze(1)]
    found = [Jagged.from_lengths(rows[:0], torch.zeros_like(done[0]))]
    num_draws = 2 * int(num_wanted.max())
    while len(left):
        sampler = NegativeSampler(num_items, num_draws, seed=seed)
        drawn = sampler.sample(rows[left], step=step, exclude=exclude.select(left)).ids
        is_new = _is_first_in_row(drawn)
        count, wanted = is_new.cumsum(1), num_wanted[left].unsqueeze(1)
        is_enough = count[:, -1:] >= wanted
        kept = drawn[is_new & (count <= wanted) & is_enough]
        some = left[is_enough.squeeze(1)]
        found.append(Jagged.from_lengths(kept, num_wanted[some]))
        done.append(some)
        left = left[~is_enough.squeeze(1)]
        num_draws *= 2  # the draws of before are the first of these
    return Jagged.stack(found).select(torch.cat(done).argsort())


def _is_first_in_row(ids: Tensor) -> Tensor:
    """(R, M) bool: whether no earlier entry of the row is the same."""
    ascending, order = ids.sort(dim=1, stable=True)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ascending.diff(dim=1) != 0
    return is_first.scatter(1, order, is_first)


# --- given --------------------------------------------------------------------------------------


def read_candidates(path: Path, dataset: PreparedDataset, users: Tensor) -> tuple[Jagged, int]:
    """The distinct candidates of each of these users (U,) of this rank, and how many are unknown.

    Args:
        path: a Parquet file; a row is an external id of a user and one of an item, as strings or
            integers.
    Returns:
        U rows of dense item ids, ascending; the candidates left out, as not in the catalogue.
    Raises:
        DataError: a file that cannot be read or has other columns; a user without candidates.
    """
    rows = _scan(path)
    asked = dataset.users["external_id"].gather(users.numpy()).cast(pl.String)
    known_users = pl.DataFrame({"user": asked, "row": range(len(users))})
    items = dataset.items["external_id"].cast(pl.String)
    known_items = pl.DataFrame({"item": items, "id": range(len(items))})
    with _readable(path):
        found = (
            rows.join(known_users.lazy(), on="user")
            .join(known_items.lazy(), on="item", how="left")
            .select("row", "id")
            .collect()
        )
    known = found.drop_nulls().unique().sort("row", "id")
    row, item = (torch.from_numpy(known[name].to_numpy(writable=True)) for name in ("row", "id"))
    candidates = Jagged.from_lengths(item, torch.bincount(row, minlength=len(users)))
    without = torch.nonzero(candidates.lengths == 0).squeeze(1)
    if len(without):
        raise DataError(
            f'{path}: no candidates for test user "{asked[int(without[0])]}"; add rows for every '
            "test user, or draw candidates by evaluate.candidates.num"
        )
    return candidates, found["id"].null_count()


def _scan(path: Path) -> pl.LazyFrame:
    """`user` and `item` as strings."""
    with _readable(path):
        rows = pl.scan_parquet(path, glob=False)
        schema = rows.collect_schema()
    for name in ("user", "item"):
        if name not in schema:
            raise DataError(
                f'{path}: candidates need the columns "user" and "item", found '
                f"{', '.join(schema)}; rename them"
            )
        if schema[name] != pl.String and not schema[name].is_integer():
            raise DataError(
                f'{path}: column "{name}" must hold strings or integers, found {schema[name]}; '
                "write the ids as in the log"
            )
    return rows.select(pl.col("user", "item").cast(pl.String))


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise DataError(f"evaluate.candidates.path: there is no file {path}; check the path")
    try:
        yield
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"evaluate.candidates.path: {path} is no Parquet file that can be read ({reason}); "
            "write it again"
        ) from None

"""The serving face: a trained run, asked by external ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchrec_pt.build import build_task, load_learner
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import (
    Ranks,
    gather_objects,
    gather_rows,
    join_ranks,
    raised_together,
)
from torchrec_pt.learner import Learner
from torchrec_pt.runs import is_of_ranking, load_run_config, served_stage
from torchrec_pt.scoring import ModelScorer, gather_blocks, head_of, top_items


@dataclass(frozen=True)
class Recommendation:
    """One offered item; `features` are its columns in items.parquet."""

    item: str | int
    score: float
    features: dict[str, object]


class Recommender:
    """Answers from one model and the dataset it was trained on.

    Under several ranks all of them ask the same questions and get the same answers.
    """

    def __init__(self, learner: Learner, dataset: PreparedDataset, ranks: Ranks) -> None:
        self.dataset = dataset
        self.ranks = ranks
        self._history = dataset.history("test")
        self._scorer = ModelScorer(learner.backbone, self._history, ranks, head_of(learner))

    @property
    def first_user(self) -> str | int:
        """External id of the first user of the first rank."""
        ids = [*self.dataset.users["external_id"].head(1)]
        return next(id for part in gather_objects(ids) for id in part)

    @classmethod
    def load(cls, run_dir: str | Path) -> Recommender:
        """The best model of a finished run: fine-tuned for ranking, or else pretrained.

        Raises:
            ValueError: no finished run there.
        """
        ranks = join_ranks()
        dataset, learner = load_served(Path(run_dir), ranks)
        return cls(learner, dataset, ranks)

    def recommend(
        self,
        user: str | int | None = None,
        *,
        history: Sequence[str | int] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
    ) -> list[Recommendation]:
        """The k best items for a known user, or for anybody with this history.

        Args:
            user: external id. history: external item ids, oldest first. Exactly one is given.
        Raises:
            ValueError: both or neither given.  DataError: an unknown id.
        """
        if (user is None) == (history is None):
            raise ValueError("recommend: give either user or history")
        device = self.ranks.device
        if user is not None:
            found = find_user(self.dataset, user)
            own = torch.tensor([] if found is None else [found], dtype=torch.int64)
            (seen,) = [s for s in gather_blocks(self._history.select(own).to(device)) if s.num_rows]
            query = gather_rows(self._scorer.queries(own))
        else:
            ids = [self.dataset.item_index(item) for item in history or ()]
            seen = Jagged(torch.tensor(ids, dtype=torch.int64), torch.tensor([0, len(ids)]))
            nobody = torch.tensor([-1], device=device)
            query = self._scorer.queries_after(nobody, seen.to(device))
        ids_, scores = top_items(
            self._scorer,
            query,
            seen if exclude_seen else None,
            k,
            self.dataset.num_items,
            self.ranks,
        )
        return self._answers(ids_[0], scores[0])

    def _answers(self, ids: Tensor, scores: Tensor) -> list[Recommendation]:
        is_candidate = torch.isfinite(scores)
        rows = self.dataset.items[ids[is_candidate].tolist()].to_dicts()
        return [
            Recommendation(row.pop("external_id"), score, row)
            for row, score in zip(rows, scores[is_candidate].tolist(), strict=True)
        ]


def find_user(dataset: PreparedDataset, external_id: str | int) -> int | None:
    """The user's place on the rank that has them, None on the others; all ranks call it.

    Raises:
        DataError: no rank has this user.
    """
    is_mine = dataset.has_user(external_id)
    if any(gather_objects(is_mine)):
        return dataset.user_index(external_id) if is_mine else None
    with raised_together():
        # A rank without users has no hint to give; the first rank has some.
        return dataset.user_index(external_id) if dataset.num_users else None


def load_served(run_dir: Path, ranks: Ranks) -> tuple[PreparedDataset, Learner]:
    """The data and the served model of a finished run, with its head; all ranks call it.

    Raises:
        ValueError: no finished run there.
    """
    config = load_run_config(run_dir)
    with raised_together():
        dataset = PreparedDataset.load(config.prepared_dir, ranks)
    stage = served_stage(config, dataset)
    objectives = [build_task(config, "ranking", dataset)] if is_of_ranking(stage) else []
    return dataset, load_learner(config, stage.checkpoint, dataset, ranks, objectives)

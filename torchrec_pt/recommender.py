"""The serving face: a trained run, asked by external ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchrec_pt.build import load_learner
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import Ranks, join_ranks
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.runs import load_run_config, served_stage
from torchrec_pt.scoring import ModelScorer, encode_histories, top_items


@dataclass(frozen=True)
class Recommendation:
    """One offered item; `features` are its columns in items.parquet."""

    item: str | int
    score: float
    features: dict[str, object]


class Recommender:
    """Answers from one backbone and the dataset it was trained on.

    Under several ranks all of them ask the same questions and get the same answers.
    """

    def __init__(self, backbone: Backbone, dataset: PreparedDataset, ranks: Ranks) -> None:
        self.backbone = backbone
        self.dataset = dataset
        self.ranks = ranks
        self._history = dataset.history("test")
        self._scorer = ModelScorer(backbone, self._history, ranks)

    @classmethod
    def load(cls, run_dir: str | Path) -> Recommender:
        """The best model of a finished run: fine-tuned for ranking, or else pretrained.

        Raises:
            ValueError: no finished run there.
        """
        ranks = join_ranks()
        dataset, backbone = load_served(Path(run_dir), ranks)
        return cls(backbone, dataset, ranks)

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
        known = -1
        if user is not None:
            known = self.dataset.user_index(user)
            seen = self._history.select(torch.tensor([known]))
        else:
            ids = [self.dataset.item_index(item) for item in history or ()]
            seen = Jagged(torch.tensor(ids, dtype=torch.int64), torch.tensor([0, len(ids)]))
        device = self.ranks.device
        vector = encode_histories(
            self.backbone, torch.tensor([known], device=device), seen.to(device)
        )
        ids_, scores = top_items(
            vector @ self._scorer.keys.T,
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


def load_served(run_dir: Path, ranks: Ranks) -> tuple[PreparedDataset, Backbone]:
    """The data and the served model of a finished run; all ranks call it.

    Raises:
        ValueError: no finished run there.
    """
    config = load_run_config(run_dir)
    dataset = PreparedDataset.load(config.prepared_dir)
    learner = load_learner(config, served_stage(config, dataset).checkpoint, dataset, ranks)
    return dataset, learner.backbone

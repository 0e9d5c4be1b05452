"""The serving face: a trained run, asked by external ids."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.entity_features import new_item_features
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import (
    Ranks,
    gather_objects,
    gather_rows,
    join_ranks,
)
from torchrec_pt.diversity import choose_diverse
from torchrec_pt.explanations import Reason, shares_of_history
from torchrec_pt.external_ids import ExternalId, Places
from torchrec_pt.item_filter import ItemFilter
from torchrec_pt.learner import Learner
from torchrec_pt.pair_predictions import PairPredictor
from torchrec_pt.retrieval import Likeness, build_retrieval
from torchrec_pt.runs import finished_stages
from torchrec_pt.scoring import ModelScorer, gather_blocks, head_of, top_items
from torchrec_pt.served import load_served

MOST_REASONS = 3
# Of the best items, so many (or 10 k) are what a diverse list is chosen from.
FEWEST_TO_CHOOSE_FROM = 100


@dataclass(frozen=True)
class Recommendation:
    """One offered item.

    Attributes:
        features: its columns in items.parquet, but for vectors.
        because: where asked for, the items of the history that are most like it, best first.
    """

    item: ExternalId
    score: float
    features: dict[str, object]
    because: tuple[Reason, ...] = ()


@dataclass(frozen=True)
class Scores:
    """What a model says of items, in the order they were asked in.

    Attributes:
        task: "ctr": probabilities of a click. "ranking": scores that rank items for one person,
            of no unit. "rating": in the unit of the ratings.
    """

    task: Literal["ctr", "ranking", "rating"]
    items: list[ExternalId]
    values: list[float]


@dataclass(frozen=True)
class _People:
    """Those who are asked about, the same on every rank.

    Attributes:
        queries: (B, Q)
        history: B rows of what each took, oldest first.
    """

    queries: Tensor
    history: Jagged


class Recommender:
    """Answers from one model and the dataset it was trained on.

    In one process several threads may ask at once. Under several ranks all of them ask the same
    questions, one at a time, and get the same answers.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: PreparedDataset,
        learner: Learner,
        ranks: Ranks,
        *,
        retrieval: Literal["exact", "hnsw"] = "exact",
    ) -> None:
        self.dataset = dataset
        self.ranks = ranks
        self._config = config
        self._history = dataset.history("test")
        self._scorer = ModelScorer(learner.backbone, self._history, ranks, head_of(learner))
        self._retrieval = build_retrieval(retrieval, self._scorer, ranks)
        self._places = Places(dataset, ranks)
        self._vector_columns = [
            summary.feature.column
            for summary in dataset.manifest.features
            if summary.feature.of == "item" and summary.feature.kind == "vector"
        ]
        self._stages = finished_stages(config, dataset)
        self._predictors: dict[str, PairPredictor] = {}
        self._loading = threading.Lock()

    @classmethod
    def load(
        cls, folder: str | Path, *, retrieval: Literal["exact", "hnsw"] = "exact"
    ) -> Recommender:
        """The best model of a finished run, or of what `export_package` made of one.

        It is the one fine-tuned for ranking, or else the pretrained one.

        Args:
            folder: of a run or a package; or of a training stage or a checkpoint in one, whose
                model answers then.
            retrieval: "exact" scores every item; "hnsw" walks a graph of the item vectors, which
                is built here, and may miss some of the best.
        Raises:
            ValueError: no finished run there, or a model or ranks that no graph serves.
        """
        ranks = join_ranks()
        served = load_served(Path(folder), ranks)
        return cls(served.config, served.dataset, served.learner, ranks, retrieval=retrieval)

    from_pretrained = load

    @property
    def first_user(self) -> ExternalId:
        """External id of the first user of the first rank."""
        ids = [*self.dataset.users["external_id"].head(1)]
        return next(id for part in gather_objects(ids) for id in part)

    # --- lists ------------------------------------------------------------------------------

    def recommend(
        self,
        user: ExternalId | None = None,
        *,
        history: Sequence[ExternalId] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        filter: ItemFilter | None = None,
        diversity: float = 0.0,
        explain: bool = False,
    ) -> list[Recommendation]:
        """The k best items for a known user, or for anybody with this history.

        Args:
            user: external id. history: external item ids, oldest first. Exactly one is given.
            diversity: 0 for the best items, up to 1 for such as are unlike each other
                (`choose_diverse`).
            explain: with the items of the history that are most like each.
        Returns:
            Fewer than k where candidates run out.
        Raises:
            ValueError: both or neither given, or options out of range.  DataError: an unknown id.
        """
        if (user is None) == (history is None):
            raise ValueError("recommend: give either user or history")
        (found,) = self.recommend_many(
            users=None if user is None else [user],
            histories=None if history is None else [history],
            k=k,
            exclude_seen=exclude_seen,
            filter=filter,
            diversity=diversity,
            explain=explain,
        )
        return found

    def recommend_many(
        self,
        users: Sequence[ExternalId] | None = None,
        *,
        histories: Sequence[Sequence[ExternalId]] | None = None,
        k: int = 10,
        exclude_seen: bool = True,
        filter: ItemFilter | None = None,
        diversity: float = 0.0,
        explain: bool = False,
    ) -> list[list[Recommendation]]:
        """`recommend` for several at once, in their order, which costs less than one by one."""
        _check_count("recommend.k", k)
        if not 0 <= diversity <= 1:
            raise ValueError(f"recommend.diversity: must be from 0 to 1, given {diversity}")
        people = self._people("recommend", users, histories)
        if not len(people.queries):
            return []
        seen = people.history if exclude_seen else None
        num = k if diversity == 0 else max(10 * k, FEWEST_TO_CHOOSE_FROM)
        ids, scores = self._retrieval.search(people.queries, num, seen, self._allowed(filter))
        if diversity > 0:
            vectors = self._scorer.vectors(ids.flatten()).unflatten(0, ids.shape)
            places = choose_diverse(scores, vectors, k, diversity)
            ids = ids.gather(1, places.clamp(min=0))
            scores = scores.gather(1, places.clamp(min=0)).masked_fill(places < 0, -torch.inf)
        reasons = self._reasons(ids, people.history) if explain else None
        return self._answers(ids, scores, reasons)

    def similar_items(
        self, item: ExternalId, k: int = 10, *, filter: ItemFilter | None = None
    ) -> list[Recommendation]:
        """The k items whose vectors have the largest cosine, the score, with this one's."""
        _check_count("similar_items.k", k)
        place = self._places.of_items([item])
        likeness = Likeness(self._scorer)
        itself = Jagged(place, torch.tensor([0, 1]))
        ids, scores = top_items(
            likeness,
            likeness.queries(place.to(self.ranks.device)),
            itself,
            k,
            self.dataset.num_items,
            self.ranks,
            self._allowed(filter),
        )
        return self._answers(ids, scores, None)[0]

    # --- numbers ----------------------------------------------------------------------------

    def score(
        self,
        items: Sequence[ExternalId],
        *,
        user: ExternalId | None = None,
        history: Sequence[ExternalId] | None = None,
        task: Literal["ctr", "ranking"] | None = None,
    ) -> Scores:
        """What somebody makes of the items: probabilities of a click, or else ranking scores.

        Args:
            task: which of the two; None: clicks where the run was fine-tuned for them.
        Raises:
            ValueError: neither or both of user and history given, or clicks asked of a run that
                was not fine-tuned for them.  DataError: an unknown id.
        """
        if task not in (None, "ctr", "ranking"):
            raise ValueError(f'score.task: must be "ctr" or "ranking", given "{task}"')
        if task == "ctr" or (task is None and "finetune/ctr/pretrained" in self._stages):
            return self._predict("score", "ctr", items, user, history)
        people = self._people(
            "score", None if user is None else [user], None if history is None else [history]
        )
        found = self._scorer.scores_of(
            people.queries, self._places.of_items(items).to(self.ranks.device)
        )
        return Scores("ranking", list(items), found[0].tolist())

    def predict_rating(
        self,
        items: Sequence[ExternalId],
        *,
        user: ExternalId | None = None,
        history: Sequence[ExternalId] | None = None,
    ) -> Scores:
        """How somebody would rate the items; of a bare history the ratings are unknown.

        Raises:
            ValueError: a run that was not fine-tuned for rating.  DataError: an unknown id.
        """
        return self._predict("predict_rating", "rating", items, user, history)

    def embed_users(
        self,
        users: Sequence[ExternalId] | None = None,
        *,
        histories: Sequence[Sequence[ExternalId]] | None = None,
    ) -> npt.NDArray[np.float32]:
        """(N, D) vectors after all that they took; as they are exported."""
        people = self._people("embed_users", users, histories)
        # A query begins with the user's vector; that of an mlp head goes on with features.
        vectors = people.queries[:, : self._scorer.backbone.dim]
        return vectors.cpu().numpy()

    def embed_items(
        self,
        items: Sequence[ExternalId] | None = None,
        *,
        features: Sequence[Mapping[str, Any]] | None = None,
    ) -> npt.NDArray[np.float32]:
        """(N, D) vectors of items, by default of all of them in the order of items.parquet.

        Args:
            features: in place of items: new ones, each by its features as in the raw data. What
                is not said of one is unknown.
        Raises:
            ValueError: both given, or features for a model that reads none.  DataError: an
                unknown id or feature.
        """
        if features is not None:
            if items is not None:
                raise ValueError("embed_items: give either items or features")
            new = new_item_features(self.dataset, features)
            return self._scorer.backbone.encode_new_items(new, self.ranks.device).cpu().numpy()
        if items is None:
            return gather_rows(self._scorer.own_vectors).cpu().numpy()
        places = self._places.of_items(items).to(self.ranks.device)
        return self._scorer.vectors(places).cpu().numpy()

    # --- within -----------------------------------------------------------------------------

    def _people(
        self,
        where: str,
        users: Sequence[ExternalId] | None,
        histories: Sequence[Sequence[ExternalId]] | None,
    ) -> _People:
        if (users is None) == (histories is None):
            raise ValueError(f"{where}: give either user or history")
        device = self.ranks.device
        if histories is not None:
            rows = [self._places.of_items(history) for history in histories]
            lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
            history = Jagged.from_lengths(torch.cat([lengths[:0], *rows]), lengths).to(device)
            nobody = torch.full_like(lengths, -1).to(device)
            return _People(self._scorer.queries_after(nobody, history), history)
        assert users is not None
        own = self._places.of_own_users(users)
        is_mine = own >= 0
        history = self._history.select(own[is_mine]).to(device)
        queries = gather_rows(self._scorer.queries(own[is_mine]))
        order = gather_rows(torch.nonzero(is_mine).squeeze(1).to(device)).argsort()
        return _People(queries[order], Jagged.stack(gather_blocks(history)).select(order))

    def _allowed(self, filter: ItemFilter | None) -> Tensor | None:
        return None if filter is None else filter.allowed(self.dataset.items, self._places.of_items)

    def _predict(
        self,
        where: str,
        task: Literal["ctr", "rating"],
        items: Sequence[ExternalId],
        user: ExternalId | None,
        history: Sequence[ExternalId] | None,
    ) -> Scores:
        if (user is None) == (history is None):
            raise ValueError(f"{where}: give either user or history")
        predictor = self._predictor(where, task)
        places = self._places.of_items(items)
        if user is not None:
            found = predictor.of_user(int(self._places.of_own_users([user])), places)
        else:
            found = predictor.of_history(self._places.of_items(history or ()), places)
        return Scores(task, list(items), found.tolist())

    def _predictor(self, where: str, task: Literal["ctr", "rating"]) -> PairPredictor:
        """Loaded when first asked for."""
        stage = self._stages.get(f"finetune/{task}/pretrained")
        if stage is None:
            raise ValueError(
                f"{where}: needs a model fine-tuned for {task}, {self._config.run_dir} has none; "
                f"give the run a section [finetune.{task}] and finetune it"
            )
        with self._loading:
            if task not in self._predictors:
                self._predictors[task] = PairPredictor.load(
                    self._config, task, stage.checkpoint, self.dataset, self.ranks
                )
            return self._predictors[task]

    def _reasons(self, ids: Tensor, history: Jagged) -> list[list[tuple[Reason, ...]]]:
        """Of each offered item of B rows; from what the model reads of each history."""
        found = []
        read = history.tail(self._scorer.backbone.history_length)
        for offered, own in zip(ids, read.values.split(read.lengths.tolist()), strict=True):
            distinct = own.unique()
            vectors = self._scorer.vectors(torch.cat([offered, distinct]))
            shares = shares_of_history(vectors[: len(offered)], vectors[len(offered) :])
            best = shares.topk(min(MOST_REASONS, len(distinct)), dim=1)
            names = self.dataset.items["external_id"][distinct[best.indices].cpu().numpy().ravel()]
            reasons = map(Reason, names, best.values.flatten().tolist())
            found.append([tuple(islice(reasons, best.indices.shape[1])) for _ in offered])
        return found

    def _answers(
        self, ids: Tensor, scores: Tensor, reasons: list[list[tuple[Reason, ...]]] | None
    ) -> list[list[Recommendation]]:
        table = self.dataset.items.drop(self._vector_columns)
        rows = table[ids.flatten().cpu().numpy()].to_dicts()
        because = [()] * len(rows) if reasons is None else chain.from_iterable(reasons)
        found = (
            Recommendation(row.pop("external_id"), score, row, why)
            for row, score, why in zip(rows, scores.flatten().tolist(), because, strict=True)
        )
        lists = (islice(found, ids.shape[1]) for _ in ids)
        return [[one for one in each if math.isfinite(one.score)] for each in lists]


def _check_count(where: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{where}: must be 1 or more, given {count}")

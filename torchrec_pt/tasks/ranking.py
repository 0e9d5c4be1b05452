"""Ranking: which items a user takes next, among the catalogue or before the negatives of a list."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import ModelConfig, RankingConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.ranking_head import InnerHead, build_head
from torchrec_pt.objectives.item_softmax import build_sampler
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.objectives.lots import draw_place
from torchrec_pt.tasks import ranking_losses
from torchrec_pt.tasks.relevance import Relevance, load_relevance


class RankingTask(nn.Module):
    """Histories are cut at random; the relevant items after the cut are to rank above the others.

    softmax without negatives: above the whole catalogue. Every other loss (`ranking_losses`):
    above the negatives of a list, items that the user never took in training; where impressions
    are given, the first ones shown after the cut and not taken, up to half of the negatives.

    Args:
        item_counts: (num_items,) int64, how often each item was taken in training.
        head: default: the inner product.
        relevance: default: every item of a history is relevant alike.
    """

    name = "ranking"
    scale = 1.0

    def __init__(
        self,
        config: RankingConfig,
        model: ModelConfig,
        item_counts: Tensor,
        *,
        seed: int,
        head: InnerHead | None = None,
        relevance: Relevance | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_items = len(item_counts)
        self.max_length = model.history_length
        self.head = head or InnerHead()
        self.relevance = relevance or Relevance()
        self.negatives = config.list_negatives
        self.needs_catalogue = self.negatives is None
        if self.negatives is not None:
            self.sampler = build_sampler(self.negatives, item_counts, seed=seed, name=self.name)

    # --- drawing ---------------------------------------------------------------------------

    def draw(self, rows: Rows) -> Draw:
        copies = self.config.targets_per_user
        keys, histories = rows.copies(copies), Jagged.stack([rows.histories] * copies)
        places, gains = self._draw_targets(keys, histories)
        # A target has a history to be predicted from; a row without a target has none.
        cut = torch.zeros_like(keys.users)
        is_first = places.positions == 0
        cut[places.rows[is_first]] = places.values[is_first]
        read = cut.clamp(max=self.max_length)
        history = histories.windows(cut - read, read)
        item = histories.values[histories.offsets[places.rows] + places.values]
        target, gains = _without_repeats(places.with_values(item), gains)
        if self.negatives is None:
            weight = _shares(target.with_values(gains)) * keys.weight[target.rows]
            tensors = {"target": target.values, "row": target.rows, "weight": weight}
            return Draw(lookups={"history": history}, tensors=tensors)

        negatives, log_q, has_others = self._draw_negatives(keys, histories, cut)
        return Draw(
            lookups={"history": history, "target": target, "negatives": negatives},
            tensors={
                "gain": gains,
                "log_q": log_q,
                "weight": keys.weight * (target.lengths > 0) * has_others,
            },
        )

    def _draw_targets(self, keys: RowKeys, histories: Jagged) -> tuple[Jagged, Tensor]:
        """R rows of consecutive relevant places, the first each as likely, and their gains (T,)."""
        places, gains = self.relevance.relevant(keys.users, histories)
        lot = keys.noise.per_row("ranking.cut", 1).squeeze(1)
        num_lots = places.lengths
        if self.config.newest is not None:
            num_lots = num_lots.clamp(max=self.config.newest)
        first = places.lengths - num_lots + draw_place(lot, (num_lots - 1).clamp(min=0))
        num = (places.lengths - first).clamp(max=self.config.targets_per_cut)
        chosen = places.windows(first, num)
        return chosen, places.with_values(gains).windows(first, num).values

    def _draw_negatives(
        self, keys: RowKeys, histories: Jagged, cut: Tensor
    ) -> tuple[Jagged, Tensor, Tensor]:
        """R rows of M negatives each, their log_q (R, M), and (R,) whether the row has any.

        Items shown come first and are certain; the sampled ones are none of them.
        """
        assert self.negatives is not None
        num = self.negatives.num
        shown = self.relevance.shown_after(keys.users, cut, most=-(-num // 2))
        avoided = _side_by_side(Jagged(histories.values, histories.offsets), shown).to_sets()
        has_others = avoided.lengths < self.num_items
        avoided = avoided.filter(has_others[avoided.rows])  # who took everything counts for nothing
        noise = keys.noise
        ids, log_q = self.sampler.sample(noise.rows, step=noise.step, exclude=avoided)
        # Of M draws the row keeps those that what it was shown leaves room for.
        kept = (num - shown.lengths).unsqueeze(1)
        log_q = log_q + (kept / num).log()
        ids[shown.rows, shown.positions] = shown.values
        log_q[shown.rows, shown.positions] = 0.0
        one_each = torch.arange(len(ids) + 1)
        return Jagged(ids.flatten(), one_each * num), log_q, has_others

    # --- loss ------------------------------------------------------------------------------

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm:
        keys = keys.copies(self.config.targets_per_user)
        user = backbone.encode_users(keys.users, drawn.vectors["history"], keys.noise)
        queries = self.head.of_users(keys.users, user)
        weight = drawn.tensors["weight"]
        if self.negatives is None:
            assert catalogue is not None
            # Indexing would add up its gradient in the order in which threads come.
            query, target = F.embedding(drawn.tensors["row"], queries), drawn.tensors["target"]
            temperature = self.config.temperature
            total = catalogue.softmax_loss(query, target, weight, temperature=temperature)
            return LossTerm(total, weight.sum())
        scores, gains, mask = self._lists(backbone, drawn, keys, queries)
        each = self._list_losses(scores / self.config.temperature, gains, mask, drawn)
        return LossTerm((each * weight).sum(), weight.sum())

    def _lists(
        self, backbone: Backbone, drawn: Embedded, keys: RowKeys, queries: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores (R, K + M), gains (R, K) and mask (R, K + M), as `ranking_losses` take them."""
        target, negatives = drawn.ids["target"], drawn.ids["negatives"]
        ids = torch.cat([target.values, negatives.values])
        found = torch.cat([drawn.vectors[name].values for name in ("target", "negatives")])
        item_keys = self.head.of_items(ids, backbone.encode_items(ids, found))
        num_first = self.config.targets_per_cut
        row = torch.cat([target.rows, negatives.rows])
        place = torch.cat([target.positions, num_first + negatives.positions])
        drop = RowDropout(self.config.dropout, keys.noise, "ranking.head", row, place)
        found_scores = self.head.of_pairs(F.embedding(row, queries), item_keys, drop)
        shape = (len(queries), num_first + drawn.tensors["log_q"].shape[1])
        scores = found_scores.new_zeros(shape).index_put((row, place), found_scores)
        mask = torch.zeros(shape, dtype=torch.bool, device=row.device)
        mask[row, place] = True
        gains = scores.new_zeros(len(queries), num_first)
        gains[target.rows, target.positions] = drawn.tensors["gain"]
        return scores, gains, mask

    def _list_losses(self, scores: Tensor, gains: Tensor, mask: Tensor, drawn: Embedded) -> Tensor:
        """(R,)"""
        match self.config.loss:
            case "softmax":
                return ranking_losses.softmax_loss(scores, gains, mask, drawn.tensors["log_q"])
            case "bpr":
                return ranking_losses.bpr_loss(scores, gains, mask)
            case "hinge":
                return ranking_losses.hinge_loss(scores, gains, mask, self.config.margin)
            case "listnet":
                return ranking_losses.listnet_loss(scores, gains, mask)
            case "lambda":
                return ranking_losses.lambda_loss(scores, gains, mask)
        return ranking_losses.approx_ndcg_loss(scores, gains, mask)


def build_ranking(
    config: RankingConfig, model: ModelConfig, dataset: PreparedDataset, *, seed: int
) -> RankingTask:
    """The task on this data, its head with initial values from torch's generator.

    Raises:
        ValueError: ratings or impressions are asked for, and the data have none that serve.
    """
    return RankingTask(
        config,
        model,
        dataset.item_counts,
        seed=seed,
        head=build_head(config, model, dataset),
        relevance=load_relevance(config, dataset, seed),
    )


def _without_repeats(target: Jagged, gains: Tensor) -> tuple[Jagged, Tensor]:
    """An item that a row names twice counts once, as it comes first."""
    longest = int(target.lengths.max()) if target.num_rows else 0
    padded = torch.full((target.num_rows, longest), -1)
    padded[target.rows, target.positions] = target.values
    is_repeat = (padded.unsqueeze(2) == padded.unsqueeze(1)).tril(-1).any(2)
    keep = ~is_repeat[target.rows, target.positions]
    return target.filter(keep), gains[keep]


def _shares(gains: Jagged) -> Tensor:
    """(T,) each gain over the sum of its row."""
    sums = torch.zeros(gains.num_rows).index_add(0, gains.rows, gains.values)
    return gains.values / sums[gains.rows]


def _side_by_side(one: Jagged, other: Jagged) -> Jagged:
    """Row i of `one`, then row i of `other`."""
    order = torch.cat([one.rows, other.rows]).argsort(stable=True)
    values = torch.cat([one.values, other.values])[order]
    return Jagged.from_lengths(values, one.lengths + other.lengths)

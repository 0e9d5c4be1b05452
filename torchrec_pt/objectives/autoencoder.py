"""Reconstruction of a history from what corruption leaves of it, against the whole catalogue.

With s_j = z · v_j + b_j the score of item j, x_j = 1 for the n items of a history and 0 for others:

    multinomial   n · logsumexp_j(s_j / τ) − Σ_{j in x} s_j / τ      Liang et al. 2018, section 2.1
    mse           Σ_j c_j (s_j − x_j)², c_j = positive_weight where x_j = 1, else 1
                                                                     Hu et al. 2008, section 4
    bce           Σ_j softplus(s_j) − Σ_{j in x} s_j                 Liang et al. 2018, section 2.1
    ratings, mse  Σ_{j in x} (s_j − r_j)²                            Sedhain et al. 2015, section 2

each the mean over users of a sum over items, as in the papers: long histories weigh more, and
beside other objectives, whose losses are of single items, `weight` should be that much smaller.
(On MovieLens-100K the mean over all items taken was worse.) r_j are ratings less their mean, in
standard deviations, of training. Sums over the catalogue are `Catalogue`'s, which never holds
users × items. A variational backbone adds β · KL, where β grows from 0 over anneal_steps (Liang et
al. 2018, section 2.2.2).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt.config import Autoencoder as AutoencoderSettings
from torchrec_pt.config import ModelConfig
from torchrec_pt.data.batch import Draw, Embedded, RowKeys, Rows, rows_of_users
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.data.splits import TRAIN
from torchrec_pt.distributed import sum_over_ranks
from torchrec_pt.models.autoencoder import Autoencoder, sums_of, unit_bags_of
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.catalogue import Catalogue
from torchrec_pt.objectives.loss_term import LossTerm
from torchrec_pt.objectives.windows import draw_windows

KL_WEIGHT = 0.2  # what annealing led to in the paper's section 4.3


class AutoencoderObjective(nn.Module):
    """Each item of a history is hidden from the encoder with probability `corruption`.

    An item that a history holds twice counts once; each of its ratings counts. Ratings weigh what
    the encoder reads; after pretraining it reads histories without them, as if each rating were
    one standard deviation above the mean.

    Raises:
        ValueError: another backbone, settings of a variational one for one that is not, or ratings
            of which there are none, or that are all alike.
    """

    def __init__(
        self, config: AutoencoderSettings, model: ModelConfig, dataset: PreparedDataset
    ) -> None:
        super().__init__()
        _check_backbone(config, model)
        self.name = config.name
        self.scale = config.weight
        self.config = config
        self.max_length = model.max_length
        self.needs_catalogue = config.values == "binary"
        self.kl_weight = KL_WEIGHT if config.kl_weight is None else config.kl_weight
        if config.values == "rating":
            is_train = (dataset.split == TRAIN) & dataset.is_taken
            self._items = dataset.interactions.values
            self._ratings = standardized(dataset.rating, is_train)
            rows = torch.arange(len(is_train))
            self._train = dataset.interactions.with_values(rows).filter(is_train)

    # --- drawing ---------------------------------------------------------------------------

    def draw(self, rows: Rows) -> Draw:
        tensors = {}
        if self.config.values == "rating":
            rows = replace(rows, histories=rows_of_users(self._train, rows.users))
            taken = draw_windows(rows, self.max_length, "autoencoder.window")
            tensors["rating"] = self._ratings[taken.values]
            history = taken.with_values(self._items[taken.values])
        else:
            history = draw_windows(rows, self.max_length, "autoencoder.window").to_sets()
        lot = rows.noise.per_token("autoencoder.corrupt", history.rows, history.positions)
        tensors["is_hidden"] = lot < self.config.corruption
        return Draw(lookups={"history": history}, tensors=tensors)

    # --- loss ------------------------------------------------------------------------------

    def loss(
        self,
        backbone: Backbone,
        drawn: Embedded,
        keys: RowKeys,
        catalogue: Catalogue | None,
    ) -> LossTerm:
        assert isinstance(backbone, Autoencoder)
        history, rating = drawn.places["history"], drawn.tensors.get("rating")
        # Of the table's rows [w | v, b], what encodes and what decodes.
        encoding, decoding = drawn.rows.split([backbone.input_dim, backbone.dim], dim=1)
        is_read = ~drawn.tensors["is_hidden"]
        bags = unit_bags_of(
            encoding.contiguous(),
            history.filter(is_read),
            None if rating is None else rating[is_read],
        )
        user, divergence = backbone.encode_bags(bags, keys.noise)
        if rating is not None:
            total = (_scores(user, decoding, history) - rating).square().sum()
        else:
            assert catalogue is not None
            total = self._binary_loss(user, decoding, history, keys.weight, catalogue)
        total = total + self._annealed(keys.noise.step) * (divergence * keys.weight).sum()
        return LossTerm(total, keys.weight.sum())

    def _binary_loss(
        self, user: Tensor, items: Tensor, history: Jagged, weight: Tensor, catalogue: Catalogue
    ) -> Tensor:
        """The formulas above, of users (R, D) and of items (U, D) at the places of a history.

        A padding row has no items, and the catalogue's sums count it by its `weight` (R,).
        """
        of_taken = (user * sums_of(items.contiguous(), history)).sum()  # all their scores
        if self.config.loss == "multinomial":
            temperature, lengths = self.config.temperature, history.lengths
            normalizer = catalogue.sum_of_logsumexp(user, lengths * weight, temperature=temperature)
            return normalizer - of_taken / temperature
        if self.config.loss == "bce":
            return catalogue.sum_of_softplus(user, weight) - of_taken
        positive = self.config.positive_weight
        # c (s − 1)² in the place of s²
        taken = positive * (len(history.values) - 2 * of_taken)
        if positive != 1:
            taken = taken + (positive - 1) * _scores(user, items, history).square().sum()
        return catalogue.sum_of_squares(user, weight) + taken

    def _annealed(self, step: int) -> float:
        """β of this step."""
        num_steps = self.config.anneal_steps
        return self.kl_weight * (min(1.0, step / num_steps) if num_steps else 1.0)


def _scores(user: Tensor, items: Tensor, history: Jagged) -> Tensor:
    """(T,) of users (R, D) and the items (U, D) at the places of their histories."""
    # Indexing would add up its gradient in the order in which threads come.
    return (F.embedding(history.rows, user) * F.embedding(history.values, items)).sum(1)


def _check_backbone(config: AutoencoderSettings, model: ModelConfig) -> None:
    if model.backbone != "autoencoder":
        raise ValueError(
            "pretrain.objectives: autoencoder trains the autoencoder backbone; "
            f'model.backbone is "{model.backbone}"; set it to "autoencoder", or use contrastive'
        )
    if not model.variational and (config.kl_weight is not None or config.anneal_steps):
        raise ValueError(
            "pretrain.objectives: kl_weight and anneal_steps of autoencoder are for a variational "
            "model, and model.variational is false; set it to true, or leave them out"
        )


def standardized(ratings: Tensor | None, is_train: Tensor) -> Tensor:
    """(N,) float32: ratings less the mean of training over all ranks, in its standard deviations.

    Raises:
        ValueError: no ratings, or all of training alike.
    """
    if ratings is None:
        raise ValueError(
            "pretrain.objectives: autoencoder of ratings, and data.columns.rating is not set; "
            'set it, or set values to "binary"'
        )
    seen = ratings[is_train].double()
    moments = torch.stack([torch.ones_like(seen), seen, seen.square()]).sum(1)
    num, total, squares = sum_over_ranks(moments).tolist()
    mean = total / num
    variance = squares / num - mean**2
    if variance <= 1e-12 * mean**2:  # what rounding leaves of 0
        raise ValueError(
            f"pretrain.objectives: autoencoder of ratings, and all of training are {mean:g}; "
            'set values to "binary"'
        )
    return ((ratings - mean) / variance**0.5).float()

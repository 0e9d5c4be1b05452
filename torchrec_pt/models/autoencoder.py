"""An autoencoder over the catalogue: a bag of items in, a score for every item out.

Liang et al. 2018 (MultiDAE and MultiVAE, section 2); with the values of ratings for inputs, Sedhain
et al. 2015 (AutoRec). The first layer of such a network is an embedding bag and its last one an
inner product with every item: a row of the item table is [w | v, b], the item's weights into the
first layer, and its weights and bias in the last. A user is [z, 1] and an item [v, b], so that
z · v + b is their inner product. As in RecVAE (Shenbin et al. 2020, section 4), the decoder has
no other layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchrec_pt import rng
from torchrec_pt.config import AutoencoderConfig
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.backbone import Backbone
from torchrec_pt.models.dropout import RowDropout
from torchrec_pt.models.item_content import ItemContent
from torchrec_pt.rng import RowNoise


class Autoencoder(Backbone):
    def __init__(
        self, config: AutoencoderConfig, num_items: int, content: ItemContent | None = None
    ) -> None:
        super().__init__(config, config.history_length, num_items, content)
        self.dropout = config.dropout
        self.input_dim = config.input_dim
        self.is_linear = not config.hidden_dims
        self.bias = nn.Parameter(torch.zeros(config.input_dim))
        self.hidden = nn.ModuleList(
            nn.Linear(before, after) for before, after in pairwise(config.hidden_dims)
        )
        self.mean = nn.Linear((config.hidden_dims or (config.dim,))[-1], config.dim - 1)
        self.log_variance = None
        if config.variational:
            self.log_variance = nn.Linear(self.mean.in_features, config.dim - 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's weights as in the paper's code, biases 0, from torch's generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def layers(self) -> list[dict[str, list[str]]]:
        embeddings = {
            "item table": ["items"],
            "item content": ["content"],
            "first bias": ["bias"],
        }
        hidden = [{f"layer {i + 2}": [f"hidden.{i}"]} for i in range(len(self.hidden))]
        return [embeddings, *hidden, {"output": ["mean", "log_variance"]}]

    def encode_items(self, ids: Tensor, rows: Tensor) -> Tensor:
        return rows[:, self.input_dim :].contiguous()

    def encode_users(
        self,
        users: Tensor,
        history: Jagged,
        noise: RowNoise | None = None,
        *,
        is_masked: Tensor | None = None,
    ) -> Tensor:
        """(R, D), whose last element is 1; who the users are makes no difference.

        The order of a history makes none either. A variational model gives a sample of the user's
        distribution where there is noise, and its mean where there is none.
        """
        return self.encode_distributions(history, noise, is_masked=is_masked)[0]

    def encode_distributions(
        self, history: Jagged, noise: RowNoise | None, *, is_masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(R, D) of `encode_users`, and (R,) each user's KL divergence from the standard normal.

        The divergence is 0 where the model is not variational. Arguments as of `encode_users`.
        """
        read = history.with_values(history.values[:, : self.input_dim])
        if is_masked is not None:
            read = read.filter(~is_masked)
        return self.encode_bags(unit_bags(read), noise)

    def encode_bags(self, bags: Tensor, noise: RowNoise | None) -> tuple[Tensor, Tensor]:
        """The same of bags (R, input_dim) of items, as `unit_bags` or `unit_bags_of` makes them."""
        noise = self.heard(noise)
        place = torch.arange(len(bags), device=bags.device)
        drop = RowDropout(self.dropout, noise, "autoencoder.dropout", place, 0 * place)
        x = bags + self.bias
        x = drop(x if self.is_linear else torch.tanh(x))
        for layer in self.hidden:
            x = drop(torch.tanh(layer(x)))
        mean = self.mean(x)
        latent, divergence = mean, mean.new_zeros(len(mean))
        if self.log_variance is not None:
            log_variance = self.log_variance(x)
            squares = mean.square() + log_variance.exp() - 1 - log_variance
            divergence = 0.5 * squares.sum(1)
            if noise is not None:
                latent = mean + (0.5 * log_variance).exp() * _normal(noise, mean.shape[1])
        return F.pad(latent, (0, 1), value=1.0), divergence


def unit_bags(jagged: Jagged) -> Tensor:
    """(R, W) sum of each row's values (T, W) over √(their number): of a multi-hot of length 1."""
    sums = torch.segment_reduce(jagged.values, "sum", offsets=jagged.offsets, initial=0.0)
    return sums / _roots(jagged)


def unit_bags_of(rows: Tensor, places: Jagged, scale: Tensor | None = None) -> Tensor:
    """The same of the rows (U, W) at places (T,) int64, times `scale` (T,); never (T, W)."""
    return sums_of(rows, places, scale) / _roots(places)


def sums_of(rows: Tensor, places: Jagged, scale: Tensor | None = None) -> Tensor:
    """(R, W) sum of the rows (U, W) at each row's places (T,) int64, times `scale` (T,)."""
    return F.embedding_bag(
        places.values,
        rows,
        places.offsets,
        mode="sum",
        per_sample_weights=scale,
        include_last_offset=True,
    )


def _roots(jagged: Jagged) -> Tensor:
    return jagged.lengths.clamp(min=1).sqrt().unsqueeze(1)


def _normal(noise: RowNoise, dim: int) -> Tensor:
    """(R, dim) standard normals that belong to the rows and the step."""
    return rng.normal_rows(noise.rows, dim, noise.seed, noise.step, "autoencoder.latent")

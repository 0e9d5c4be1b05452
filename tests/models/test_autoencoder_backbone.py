"""The autoencoder backbone: what a user's and an item's vector are made of."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from torchrec_pt.config import AutoencoderConfig
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.models.autoencoder import Autoencoder, unit_bags
from torchrec_pt.rng import RowNoise

DIM, NUM_ITEMS = 8, 11
HISTORY = Jagged(torch.tensor([3, 1, 7, 3, 0, 9]), torch.tensor([0, 3, 3, 4, 6]))


def _built(**settings: object) -> tuple[Autoencoder, Tensor]:
    """The backbone, and rows for its table."""
    config = AutoencoderConfig.model_validate(
        {"backbone": "autoencoder", "dim": DIM, "hidden_dims": (12,), "dropout": 0.0, **settings}
    )
    torch.manual_seed(0)
    backbone = Autoencoder(config, NUM_ITEMS)
    return backbone, torch.randn(NUM_ITEMS, backbone.items.dim)


def _encoded(backbone: Autoencoder, table: Tensor, noise: RowNoise | None = None) -> Tensor:
    history = HISTORY.with_values(table[HISTORY.values])
    return backbone.encode_users(torch.arange(4), history, noise)


def test_scores_are_those_of_the_network_written_out() -> None:
    backbone, table = _built(hidden_dims=(12, 8))
    torch.nn.init.normal_(backbone.bias)
    multi_hot = torch.zeros(4, NUM_ITEMS)
    multi_hot[HISTORY.rows, HISTORY.values] = 1
    unit = torch.nn.functional.normalize(multi_hot, dim=1)
    into, out, bias = table[:, :12], table[:, 12:-1], table[:, -1]
    hidden = torch.tanh(backbone.hidden[0](torch.tanh(unit @ into + backbone.bias)))
    expected = backbone.mean(hidden) @ out.T + bias
    got = _encoded(backbone, table) @ backbone.encode_items(torch.arange(NUM_ITEMS), table).T
    torch.testing.assert_close(got, expected)


def test_no_hidden_layer_makes_a_linear_encoder() -> None:
    backbone, table = _built(hidden_dims=())
    expected = backbone.mean(unit_bags(HISTORY.with_values(table[HISTORY.values, :DIM])))
    torch.testing.assert_close(_encoded(backbone, table)[:, :-1], expected)
    assert backbone.items.dim == 2 * DIM


def test_the_order_of_a_history_makes_no_difference() -> None:
    backbone, table = _built()
    history = HISTORY.with_values(table[HISTORY.values])
    backwards = history.with_values(history.values[torch.tensor([2, 1, 0, 3, 5, 4])])
    users = torch.arange(4)
    torch.testing.assert_close(
        backbone.encode_users(users, backwards), backbone.encode_users(users, history)
    )


def test_encoder_and_decoder_have_weights_of_their_own() -> None:
    backbone, table = _built()
    changed = table.clone()
    changed[:, :12] += 1
    ids = torch.arange(NUM_ITEMS)
    assert torch.equal(backbone.encode_items(ids, changed), backbone.encode_items(ids, table))
    assert not torch.allclose(_encoded(backbone, changed), _encoded(backbone, table))


def test_a_user_is_sampled_in_training_alone_by_row_and_step() -> None:
    backbone, table = _built(variational=True)
    mean = _encoded(backbone, table)
    assert torch.equal(_encoded(backbone, table), mean)
    noise = RowNoise(0, 5, torch.arange(4))
    sample = _encoded(backbone, table, noise)
    assert torch.equal(_encoded(backbone, table, noise), sample)
    assert (sample[:, -1] == 1).all()
    for other in (mean, _encoded(backbone, table, RowNoise(0, 6, torch.arange(4)))):
        assert ((sample - other)[:, :-1].abs() > 1e-6).all()
    history = HISTORY.with_values(table[HISTORY.values]).select(torch.tensor([2]))
    alone = backbone.encode_users(torch.tensor([2]), history, RowNoise(0, 5, torch.tensor([2])))
    torch.testing.assert_close(alone[0], sample[2])


def test_samples_have_the_mean_and_deviation_of_their_distribution() -> None:
    backbone, table = _built(variational=True)
    assert backbone.log_variance is not None
    torch.nn.init.constant_(backbone.log_variance.weight, 0.0)
    torch.nn.init.constant_(backbone.log_variance.bias, -1.0)
    one = Jagged(table[[4]], torch.tensor([0, 1])).select(torch.zeros(20_000, dtype=torch.int64))
    samples, _ = backbone.encode_distributions(one, RowNoise(1, 0, torch.arange(20_000)))
    mean, _ = backbone.encode_distributions(one, None)
    # A standard error of 0.6 / √20000 = 0.004; 14 means are looked at.
    torch.testing.assert_close(samples.mean(0), mean[0], rtol=0, atol=0.017)
    deviation = torch.full((DIM - 1,), -0.5).exp()
    torch.testing.assert_close(samples.std(0)[:-1], deviation, rtol=0.03, atol=0)


def test_the_divergence_is_that_of_torch() -> None:
    backbone, table = _built(variational=True, hidden_dims=())
    assert backbone.log_variance is not None
    history = HISTORY.with_values(table[HISTORY.values])
    user, got = backbone.encode_distributions(history, None)
    bags = unit_bags(history.with_values(history.values[:, :DIM]))
    deviation = (0.5 * backbone.log_variance(bags)).exp()
    expected = kl_divergence(Normal(user[:, :-1], deviation), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(got, expected)


def test_a_plain_model_has_no_divergence() -> None:
    backbone, table = _built()
    _, divergence = backbone.encode_distributions(
        HISTORY.with_values(table[HISTORY.values]), RowNoise(0, 0, torch.arange(4))
    )
    assert divergence.tolist() == [0, 0, 0, 0]


def test_cosine_similarity_is_refused() -> None:
    with pytest.raises(ValidationError, match=r'"cosine", and an autoencoder\'s items have biases'):
        AutoencoderConfig(backbone="autoencoder", similarity="cosine")

"""The feature encoder against a float64 reference that walks over the cells one by one."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchrec_pt.config import TableConfig, TrainConfig
from torchrec_pt.data.batch import lookup_ids
from torchrec_pt.data.entity_features import EntityFeatures
from torchrec_pt.data.jagged import Jagged
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.models.feature_encoder import FeatureEncoder
from torchrec_pt.models.item_table import ItemTable
from torchrec_pt.placement import settle_placement
from torchrec_pt.sharding import fill_item_table, shard

DIM = 8
ODD_NAMES = ["a.b", "a b", "a_b", "a:b", "a%2E%b", "größe", "色", "a\u0301", "á", "", "weight"]


def random_features(
    num_rows: int = 20,
    categorical: tuple[str, ...] = ("single", "several"),
    dense: tuple[str, ...] = ("number", "vector"),
    seed: int = 0,
) -> EntityFeatures:
    """Cells of one to four values, but one in columns named "single"; vectors of five numbers."""
    generator = torch.Generator().manual_seed(seed)
    cells, sizes, numbers = {}, {}, {}
    for place, name in enumerate(categorical):
        longest = 1 if name == "single" else 4
        lengths = torch.randint(1, longest + 1, (num_rows,), generator=generator)
        sizes[name] = 3 + place
        values = torch.randint(sizes[name], (int(lengths.sum()),), generator=generator)
        cells[name] = Jagged.from_lengths(values, lengths)
    for name in dense:
        numbers[name] = torch.randn(num_rows, 5 if name == "vector" else 1, generator=generator)
    return EntityFeatures("user", num_rows, cells, sizes, dict.fromkeys(cells, "mean"), numbers, ())


def build(features: EntityFeatures, seed: int = 0) -> FeatureEncoder:
    torch.manual_seed(seed)
    return FeatureEncoder(features, DIM)


def reference(
    encoder: FeatureEncoder, features: EntityFeatures, ids: list[int]
) -> tuple[Tensor, list[Tensor]]:
    """(B, num_fields, dim) in float64, and the parameters it was made of."""
    weights = [p.detach().double().requires_grad_() for p in encoder.parameters()]
    tables = weights[: len(features.categorical)]
    layers = weights[len(tables) :]
    fields: list[list[Tensor]] = [[] for _ in ids]
    for table, cells in zip(tables, features.categorical.values(), strict=True):
        rows = [cells.values[a:b].tolist() for a, b in pairwise(cells.offsets.tolist())]
        for field, i in zip(fields, ids, strict=True):
            values = [0] if i < 0 else rows[i]
            field.append(sum(table[value] for value in values) / len(values))
    dense = features.dense.values()
    for weight, bias, numbers in zip(layers[::2], layers[1::2], dense, strict=True):
        for field, i in zip(fields, ids, strict=True):
            known = torch.zeros(numbers.shape[1]) if i < 0 else numbers[i]
            field.append(weight @ known.double() + bias)
    return torch.stack([torch.stack(field) for field in fields]), weights


COLUMNS = {
    "both": (("single", "several"), ("number", "vector")),
    "only categorical": (("several",), ()),
    "only dense": ((), ("vector",)),
}


@pytest.mark.parametrize("columns", list(COLUMNS))
@settings(max_examples=25, deadline=None)
@given(
    num_rows=st.integers(1, 9),
    picks=st.lists(st.integers(-1, 8), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_vectors_and_gradients_are_those_of_the_reference(
    columns: str, num_rows: int, picks: list[int], seed: int
) -> None:
    ids = [min(pick, num_rows - 1) for pick in picks]
    features = random_features(num_rows, *COLUMNS[columns], seed=seed)
    encoder = build(features, seed)
    got = encoder(torch.tensor(ids))
    expected, weights = reference(encoder, features, ids)
    assert got.shape == (len(ids), encoder.num_fields, DIM)
    assert got.dtype == torch.float32
    # float32 sums of a few terms
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    scale = torch.randn(got.shape, generator=torch.Generator().manual_seed(seed))
    (got * scale).sum().backward()
    gradients = torch.autograd.grad((expected * scale).sum(), weights)
    for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), gradient, rtol=1e-5, atol=1e-5)


def test_a_cell_of_several_values_is_the_mean_of_their_rows() -> None:
    cells = Jagged.from_lengths(torch.tensor([2, 1, 2, 0]), torch.tensor([3, 1]))
    encoder = build(
        EntityFeatures("item", 2, {"genres": cells}, {"genres": 3}, {"genres": "mean"}, {}, ())
    )
    (table,) = encoder.parameters()
    got = encoder(torch.tensor([0, 1]))[:, 0]
    torch.testing.assert_close(got[0], (2 * table[2] + table[1]) / 3)
    assert torch.equal(got[1], table[0])


def test_of_nobody_it_knows_the_unknown_values_and_the_mean_numbers() -> None:
    encoder = build(random_features())
    got = encoder(torch.tensor([-1, 3, -1]))
    parameters = dict(encoder.named_parameters())
    expected = [parameters[f"tables.embedding_bags.user_{c}.weight"][0] for c in COLUMNS["both"][0]]
    expected += [parameters[f"layers.user_{c}.bias"] for c in COLUMNS["both"][1]]
    assert torch.equal(got[0], torch.stack(expected))
    assert torch.equal(got[2], got[0])
    assert not torch.equal(got[1], got[0])


def test_of_no_entities_only_nobody_can_be_asked() -> None:
    encoder = build(random_features(num_rows=0))
    assert torch.isfinite(encoder(torch.tensor([-1]))).all()
    with pytest.raises(IndexError):
        encoder(torch.tensor([0]))


@pytest.mark.parametrize("columns", list(COLUMNS))
def test_an_empty_batch_gives_no_rows_and_zero_gradients(columns: str) -> None:
    encoder = build(random_features(20, *COLUMNS[columns]))
    got = encoder(torch.zeros(0, dtype=torch.int64))
    assert got.shape == (0, encoder.num_fields, DIM)
    got.sum().backward()
    # DDP waits for each of them.
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


def test_without_features_there_are_no_fields_and_no_parameters() -> None:
    encoder = build(random_features(20, (), ()))
    assert encoder.num_fields == 0
    assert not list(encoder.parameters())
    for num in (0, 4):
        got = encoder(torch.arange(num))
        assert got.shape == (num, 0, DIM)
        assert got.dtype == torch.float32


def test_tables_and_layers_start_normal_from_the_seed_of_the_caller() -> None:
    features = random_features(num_rows=1)
    features.num_values["single"] = 5000
    first, again, other = (build(features, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == name.endswith("bias") for name in first)
    table = first["tables.embedding_bags.user_single.weight"]
    # 40 000 values: their mean within 5 of its deviations of 1e-4, their deviation within 2 %
    assert abs(float(table.mean())) < 5e-4
    assert float(table.std()) == pytest.approx(0.02, rel=0.02)
    layers = torch.cat([v.flatten() for n, v in first.items() if "layers" in n and "weight" in n])
    assert float(layers.std()) == pytest.approx(0.02, rel=5 / (2 * len(layers)) ** 0.5)


def test_every_row_of_every_table_learns() -> None:
    features = random_features(num_rows=200)
    encoder = build(features)
    encoder(torch.arange(200)).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.flatten(1).any(1).all() if parameter.dim() > 1 else True, name
        assert parameter.grad.any(), name


def test_two_threads_train_to_the_same_bits_every_time() -> None:
    features = random_features(num_rows=300)

    def trained() -> list[Tensor]:
        encoder = build(features)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.1)
        for _ in range(3):
            # Few values and many rows: each table row is found hundreds of times.
            ids = torch.randint(-1, 300, (4096,))
            scale = torch.randn(4096, encoder.num_fields, DIM)
            optimizer.zero_grad()
            (encoder(ids) * scale).logsumexp(0).sum().backward()
            optimizer.step()
        return list(encoder.parameters())

    torch.set_num_threads(2)
    try:
        first = trained()
        assert all(all(map(torch.equal, trained(), first)) for _ in range(5))
    finally:
        torch.set_num_threads(1)


def test_a_checkpoint_holds_the_parameters_and_nothing_else() -> None:
    encoder = build(random_features())
    assert list(encoder.state_dict()) == [name for name, _ in encoder.named_parameters()]


def test_the_features_move_with_the_module() -> None:
    encoder = build(random_features()).to("meta")
    assert {tensor.device.type for tensor in [*encoder.parameters(), *encoder.buffers()]} == {
        "meta"
    }
    assert len(list(encoder.buffers())) == 2 * 2 + 2


@pytest.mark.parametrize("are_dense", [False, True])
def test_any_column_name_will_do(are_dense: bool) -> None:
    names = tuple(ODD_NAMES)
    features = random_features(20, *(((), names) if are_dense else (names, ())))
    encoder = build(features)
    ids = list(range(-1, 20))
    expected, _ = reference(encoder, features, ids)
    torch.testing.assert_close(encoder(torch.tensor(ids)).double(), expected, rtol=1e-5, atol=1e-6)
    build(features, seed=1).load_state_dict(encoder.state_dict())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=4) | st.text("a._%2E :-é", max_size=5), unique=True, max_size=8))
def test_no_two_columns_share_a_table(names: list[str]) -> None:
    tensors = build(random_features(2, tuple(names), ())).state_dict()
    assert len(tensors) == len(names)
    for tensor in tensors:
        assert re.fullmatch(r"tables\.embedding_bags\.user_[\w%-]*\.weight", tensor)


def test_a_tensor_is_named_after_its_column_and_not_its_place() -> None:
    one = build(random_features(20, ("gender", "home.town"), ("age",)))
    other = build(random_features(20, ("home.town", "job", "gender"), ("height", "age")))
    assert set(one.state_dict()) < set(other.state_dict())
    assert "tables.embedding_bags.user_gender.weight" in one.state_dict()
    assert "tables.embedding_bags.user_home%2E%town.weight" in one.state_dict()


class Both(nn.Module):
    """The row of an item, and what is known of it."""

    def __init__(self, features: EntityFeatures) -> None:
        super().__init__()
        self.items = ItemTable(features.num_rows, DIM)
        self.features = FeatureEncoder(features, DIM)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([self.items(lookup_ids(ids)).unsqueeze(1), self.features(ids)], dim=1)


@pytest.mark.parametrize("placement", ["replicated", "row_wise"])
@pytest.mark.parametrize("categorical", [("single", "several"), tuple(ODD_NAMES), ()])
def test_it_trains_beside_an_item_table_of_any_placement(
    placement: str, categorical: tuple[str, ...]
) -> None:
    features = random_features(20, categorical)
    alone = build(features)
    table, train = TableConfig.model_validate({"placement": placement}), TrainConfig()
    ids = torch.tensor([3, 0, 3, 19])
    with joined_ranks() as ranks:
        torch.manual_seed(0)
        settled = settle_placement(table, features.num_rows, DIM, "cpu")
        model = shard(Both(features), settled, train, ranks)
        fill_item_table(model, seed=0)
        encoder = model.module.features
        assert isinstance(encoder.tables, EmbeddingBagCollection if categorical else type(None))
        assert list(encoder.state_dict()) == list(alone.state_dict())
        assert {f"features.{name}" for name in alone.state_dict()} < set(model.state_dict())
        assert all(map(torch.equal, encoder.parameters(), alone.parameters()))
        got, expected = model(ids), alone(ids)
        assert torch.equal(got[:, 1:], expected)
        got.square().sum().backward()
        expected.square().sum().backward()
        for mine, theirs in zip(encoder.parameters(), alone.parameters(), strict=True):
            assert theirs.grad is not None
            assert torch.equal(mine.grad, theirs.grad)

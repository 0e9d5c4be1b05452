"""What `make reproduce` runs: recipes with the figures they are held against, and comparisons.

The comparisons were written down before any of them was run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FULL, SAMPLED = "ranking", "sampled_ranking"


@dataclass(frozen=True)
class Figure:
    """What somebody else's system reached.

    Attributes:
        protocol: FULL, over the whole catalogue, or SAMPLED, one item among 99 drawn ones.
        metrics: as in evaluate/result.json.
    """

    system: str
    source: str
    protocol: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """configs/<name>.toml, on one data set, over three seeds."""

    name: str
    title: str
    data: str
    figures: tuple[Figure, ...]


def _ndcg(hr: float, ndcg: float) -> dict[str, float]:
    return {"hr@10": hr, "ndcg@10": ndcg}


RECTOOLS = "RecTools 0.19, run here: 64 dims, 2 layers, 2 heads, length 50"
S3REC = "github.com/RUCAIBox/CIKM2020-S3Rec, the authors' rerun"
BENCHMARK = "github.com/blondered/transformer_benchmark"

RECIPES = (
    Recipe(
        "beauty_next_item",
        "each next item, causal transformer, item attributes",
        "beauty",
        (
            Figure("SASRec + sampled softmax", BENCHMARK, FULL, _ndcg(0.0921, 0.0531)),
            Figure("eSASRec", BENCHMARK, FULL, _ndcg(0.0928, 0.0523)),
            Figure("BSARec", "Shin et al. 2024", FULL, _ndcg(0.1008, 0.0611)),
        ),
    ),
    Recipe(
        "beauty_content",
        "the same with rows hidden in training and sampled items",
        "beauty",
        (Figure("S3-Rec", S3REC, SAMPLED, {**_ndcg(0.5687, 0.3816), "mrr": 0.3390}),),
    ),
    Recipe(
        "lastfm_next_item",
        "each next item, causal transformer, item attributes",
        "lastfm",
        (Figure("S3-Rec", S3REC, FULL, _ndcg(0.0743, 0.0427)),),
    ),
    Recipe(
        "lastfm_content",
        "the same with rows mostly hidden in training",
        "lastfm",
        (Figure("S3-Rec", S3REC, SAMPLED, _ndcg(0.6083, 0.3577)),),
    ),
    Recipe(
        "ml100k_next_item",
        "each next item, causal transformer",
        "ml-100k",
        (Figure("SASRec", f"{RECTOOLS}; one seed", FULL, _ndcg(0.1665, 0.0853)),),
    ),
    Recipe(
        "ml100k_masked_item",
        "masked items, bidirectional transformer",
        "ml-100k",
        (
            Figure("BERT4Rec", f"{RECTOOLS}; one seed", FULL, _ndcg(0.1919, 0.1006)),
            Figure("BERT4Rec", f"{RECTOOLS}; mean of seeds 0, 1, 2", FULL, _ndcg(0.1877, 0.0935)),
        ),
    ),
    Recipe(
        "ml100k_autoencoder",
        "denoising autoencoder",
        "ml-100k",
        (
            Figure("ALS", "implicit 0.7.3, run here: tuned; one seed", FULL, _ndcg(0.1432, 0.0735)),
            Figure("ALS", "the same; mean of seeds 0, 1, 2", FULL, _ndcg(0.1414, 0.0723)),
            Figure("MultiDAE", "RecBole 1.2.1, run here; one seed", FULL, _ndcg(0.1421, 0.0730)),
            Figure("EASE", "RecBole 1.2.1, run here", FULL, _ndcg(0.1347, 0.0706)),
        ),
    ),
)

# The objectives that pretrain before next-item training, on the causal transformer of the
# data set's next_item recipe. A [MASK] is read both ways, hence their attention.
CAUSAL, BOTH = "causal", "bidirectional"


@dataclass(frozen=True)
class Pretraining:
    """A second objective in the first half of the epochs.

    Attributes:
        objective: as in [[pretrain.objectives]].
        attention: of the first half; the weights of either fit the other.
    """

    name: str
    attention: str
    objective: Mapping[str, object] = field(default_factory=dict)


PRETRAININGS = (
    Pretraining("masked_item", BOTH, {"temperature": 0.1}),
    Pretraining("contrastive", CAUSAL, {"pairs": "views"}),
)


@dataclass(frozen=True)
class Comparison:
    """Pretrain, then train on each next item, against next items alone for as many epochs."""

    recipe: str
    pretraining: Pretraining
    epochs: int
    num_seeds: int


COMPARISONS = (
    *(Comparison("ml100k_next_item", first, 30, 5) for first in PRETRAININGS),
    *(Comparison("lastfm_next_item", first, 30, 5) for first in PRETRAININGS),
    Comparison("beauty_next_item", PRETRAININGS[0], 12, 1),
)

"""What `make reproduce` runs: recipes with the figures they are held against, and comparisons.

The comparisons and studies were written down before any of them was run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FULL, SAMPLED = "ranking", "sampled_ranking"
CLICKS, ONE_FOLD, FIVE_FOLDS = "ctr", "u1", "u1 … u5"


@dataclass(frozen=True)
class Figure:
    """What somebody else's system reached.

    Attributes:
        protocol: FULL, over the whole catalogue, or SAMPLED, one item among 99 drawn ones; CLICKS;
            ONE_FOLD or FIVE_FOLDS, the mean of the five, for ratings.
        metrics: as in evaluate/result.json.
    """

    system: str
    source: str
    protocol: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """configs/<name>.toml, on one data set, over three seeds.

    Attributes:
        task: what it is fine-tuned for; None: it is pretrained alone.
        folds: folders below the data set's, each trained on and tested by itself.
    """

    name: str
    title: str
    data: str
    figures: tuple[Figure, ...]
    task: str | None = None
    folds: tuple[str, ...] = ()


def _ndcg(hr: float, ndcg: float) -> dict[str, float]:
    return {"hr@10": hr, "ndcg@10": ndcg}


def _clicks(auc: float, logloss: float) -> dict[str, float]:
    return {"auc": auc, "logloss": logloss}


def _ratings(rmse: float, mae: float | None = None) -> dict[str, float]:
    return {"rmse": rmse} if mae is None else {"rmse": rmse, "mae": mae}


RECTOOLS = "RecTools 0.19, run here: 64 dims, 2 layers, 2 heads, length 50"
S3REC = "github.com/RUCAIBox/CIKM2020-S3Rec, the authors' rerun"
RECBOLE = "RecBole 1.2.1, run here on the same splits"
SURPRISE = "surprise 1.1.5, run here: defaults, rows in the order of u.data; one seed"
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

FINETUNED = (
    Recipe(
        "ml100k_ctr",
        "clicks, fine-tuned",
        "ml-100k",
        (
            Figure("DeepFM", f"{RECBOLE}; mean of seeds 0, 1, 2", CLICKS, _clicks(0.7854, 0.5660)),
            Figure("DCN-v2", f"{RECBOLE}; seed 0", CLICKS, _clicks(0.7756, 0.5812)),
            Figure("AutoInt", f"{RECBOLE}; seed 0", CLICKS, _clicks(0.7900, 0.5821)),
        ),
        task="ctr",
    ),
    Recipe(
        "ml100k_rating",
        "ratings, fine-tuned",
        "ml-100k-folds",
        (
            Figure("SVD", SURPRISE, ONE_FOLD, _ratings(0.9515, 0.7487)),
            Figure("SVD++", SURPRISE, ONE_FOLD, _ratings(0.9247, 0.7274)),
            Figure("GC-MC", "van den Berg et al. 2017", ONE_FOLD, _ratings(0.910)),
            Figure("GC-MC + features", "van den Berg et al. 2017", ONE_FOLD, _ratings(0.905)),
            Figure("SVD", SURPRISE, FIVE_FOLDS, _ratings(0.9395, 0.7406)),
            Figure("SVD++", SURPRISE, FIVE_FOLDS, _ratings(0.9194, 0.7223)),
        ),
        task="rating",
        folds=("u1", "u2", "u3", "u4", "u5"),
    ),
    Recipe(
        "ml100k_ranking",
        "next items, fine-tuned",
        "ml-100k",
        (
            Figure("SASRec", f"{RECTOOLS}; one seed", FULL, _ndcg(0.1665, 0.0853)),
            Figure("BERT4Rec", f"{RECTOOLS}; mean of seeds 0, 1, 2", FULL, _ndcg(0.1877, 0.0935)),
        ),
        task="ranking",
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


@dataclass(frozen=True)
class Variation:
    """A recipe fine-tuned with other settings, as --set takes them."""

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Study:
    """A recipe's variations, each from the pretraining that the recipe itself has of the seed."""

    name: str
    recipe: str
    variations: tuple[Variation, ...]
    num_seeds: int


PAIRWISE, LISTWISE = ("bpr", "hinge"), ("softmax", "listnet", "lambda", "approx_ndcg")
LOSSES = Study(
    "ranking_losses",
    "ml100k_ranking",
    tuple(Variation(loss, (f"finetune.ranking.loss={loss}",)) for loss in (*PAIRWISE, *LISTWISE)),
    num_seeds=3,
)

# Shares of the training labels; the recipe itself has all of them.
FRACTIONS = (0.01, 0.05, 0.2)


def _curve(task: str) -> Study:
    variations = (
        Variation(
            f"labels{fraction:g}",
            (f"finetune.{task}.label_fraction={fraction:g}", f"finetune.{task}.control=scratch"),
        )
        for fraction in FRACTIONS
    )
    return Study(f"{task}_curve", f"ml100k_{task}", tuple(variations), num_seeds=5)


CURVES = {task: _curve(task) for task in ("ctr", "ranking", "rating")}
STUDIES = (LOSSES, *CURVES.values())

"""What int8 tables cost: the test metrics of a run's models before and after, and the memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from torchrec_pt.config import RunConfig
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.manifest import require_rows
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.files import write_json
from torchrec_pt.held_out import gather_by_user, held_out, predict_pairs, rank_targets
from torchrec_pt.int8 import TableBytes, quantize_tables
from torchrec_pt.learner import Learner
from torchrec_pt.metrics import (
    Estimate,
    compared,
    mean_estimate,
    paired_difference,
    ranking_metrics,
)
from torchrec_pt.programs.models import load_model, only_process, used_models
from torchrec_pt.runs import load_run_config
from torchrec_pt.scoring import ModelScorer, head_of
from torchrec_pt.tasks.pairs import PairTask
from torchrec_pt.validation import gather_judged


@dataclass(frozen=True)
class Quantized:
    """One model with int8 tables.

    Attributes:
        float32, int8: metric -> value on the test split.
        loss: metric -> (int8 − float32, half-width of its 95 % interval, paired over users), of
            calibration the difference of its distances |log| from 1.
        table_bytes: of its embedding tables.
    """

    float32: dict[str, float]
    int8: dict[str, float]
    loss: dict[str, tuple[float, float]]
    table_bytes: TableBytes


def quantize_run(run_dir: str | Path) -> dict[str, Quantized]:
    """Task -> what int8 tables make of its model; also in <run_dir>/evaluate/int8.json.

    The items' table and those of features are quantized as `export_model` does it.

    Raises:
        ValueError: no finished run there, or nothing to test on.
    """
    config = load_run_config(Path(run_dir))
    found: dict[str, Quantized] = {}
    with joined_ranks() as ranks:
        only_process(ranks, "quantize")
        dataset = PreparedDataset.load(config.prepared_dir, ranks)
        require_rows(dataset.manifest, "test")
        for task, stage in used_models(config, dataset).items():
            learner = load_model(config, task, stage, dataset, ranks)
            before = _test_metrics(learner, config, dataset, ranks)
            table_bytes = quantize_tables(learner)
            after = _test_metrics(learner, config, dataset, ranks)
            found[task] = Quantized(
                {metric: one.value for metric, one in before.items()},
                {metric: one.value for metric, one in after.items()},
                {
                    metric: paired_difference(
                        compared(metric, after[metric]), compared(metric, one)
                    )
                    for metric, one in before.items()
                },
                table_bytes,
            )
    path = config.run_dir / "evaluate" / "int8.json"
    write_json(
        path,
        {
            task: {**asdict(one), "table_bytes": one.table_bytes._asdict()}
            for task, one in found.items()
        },
    )
    return found


def _test_metrics(
    learner: Learner, config: RunConfig, dataset: PreparedDataset, ranks: Ranks
) -> dict[str, Estimate]:
    """As `evaluate` measures them."""
    batch_size = config.evaluate.batch_size
    task = next(iter(learner.objectives.values()), None)
    if isinstance(task, PairTask):
        pairs = task.held_out("test")
        parts = dataset.part_of_user[pairs.users]
        predictions = predict_pairs(learner, task, pairs, parts, ranks, batch_size)
        return gather_judged(dataset, task, pairs, {"": predictions}, ranks).metrics(task, "")
    asked = held_out(dataset, "test")
    parts, users = dataset.part_of_user[asked.users], dataset.user_ids[asked.users]
    scorer = ModelScorer(learner.backbone, dataset.history("valid"), ranks, head_of(learner))
    found = rank_targets(scorer, asked, parts, dataset.num_items, ranks, batch_size)
    _, (found,) = gather_by_user(users, [found], ranks)
    return {
        metric: mean_estimate(values)
        for metric, values in ranking_metrics(found, config.evaluate.ks).items()
    }

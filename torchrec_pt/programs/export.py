"""A run's models as a folder of programs that run without this package.

<out>/model.json           every program's files, inputs and outputs, and what made them
<out>/items.parquet        id (dense, what programs take), external_id
<out>/vocabulary.parquet   of, column, value and id of the categories of features
<out>/user_encoder.*       a history -> the user's vector
<out>/item_encoder.*       dense ids -> vectors
<out>/new_item_encoder.*   features -> vectors of items that the catalogue does not have
<out>/ranking.*            history and items -> scores
<out>/ctr.*, rating.*      history and items -> probabilities of a click, ratings
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torchrec_pt import __version__
from torchrec_pt.data.atomic import whole_or_nothing
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.distributed import joined_ranks
from torchrec_pt.files import write_json
from torchrec_pt.learner import Learner
from torchrec_pt.models.ranking_head import MlpHead
from torchrec_pt.programs.encoders import (
    Encoder,
    Features,
    ItemEncoder,
    NewItemEncoder,
    Program,
    UserEncoder,
)
from torchrec_pt.programs.formats import Format, check_formats, write_program
from torchrec_pt.programs.models import load_model, only_process, used_models
from torchrec_pt.programs.ports import FeatureInputs
from torchrec_pt.programs.scorers import PairScorer, RankingScorer
from torchrec_pt.runs import load_run_config
from torchrec_pt.scoring import head_of
from torchrec_pt.tasks.pairs import PairTask

MARK = "model.json"
VERSION = 1


def export_model(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    formats: Sequence[Format] = ("pt2",),
    quantize: Literal["int8"] | None = None,
) -> Path:
    """Write the models of a finished run as programs, in one process.

    The folder appears whole or not at all, in the place of an earlier export.

    Args:
        out: a folder; default <run_dir>/model.
        formats: pt2: torch.export.load. aoti: compiled for this kind of machine,
            torch._inductor.aoti_load_package. onnx: any runtime of it.
        quantize: int8: of every embedding table a byte an element (`int8`).
    Returns:
        The folder.
    Raises:
        ValueError: no finished run there, something else in `out`, or what a format needs is not
            installed.
    """
    folder = Path(out) if out is not None else Path(run_dir) / "model"
    check_formats(formats)
    if folder.exists() and not _is_replaceable(folder):
        raise ValueError(f"{folder}: is no exported model, and would be replaced; name another")
    config = load_run_config(Path(run_dir))
    with joined_ranks() as ranks:
        only_process(ranks, "export_model")
        dataset = PreparedDataset.load(config.prepared_dir)
        features = {of: FeatureInputs(dataset, of) for of in ("user", "item", "interaction")}
        about: dict[str, Any] = {
            "format": "torchrec_pt programs",
            "version": VERSION,
            "made_by": f"torchrec_pt {__version__}",
            "tables": quantize or "float32",
            "num_items": dataset.num_items,
            "programs": {},
        }
        with whole_or_nothing(folder) as partial:
            items = dataset.items.select("external_id").with_row_index("id")
            items.write_parquet(partial / "items.parquet", use_pyarrow=True)
            dataset.vocabulary.write_parquet(partial / "vocabulary.parquet", use_pyarrow=True)
            for task, stage in used_models(config, dataset).items():
                learner = load_model(config, task, stage, dataset, ranks)
                programs = programs_of(learner, features, is_int8=quantize == "int8")
                for name, program in programs.items():
                    files = write_program(program, partial, name, formats)
                    about["programs"][name] = _described(program, files) | {
                        "model": str(stage.folder.relative_to(config.run_dir)),
                        "history_length": learner.backbone.history_length,
                    }
                if task == "ranking":
                    is_inner = not isinstance(head_of(learner), MlpHead)
                    about["ranks_by_inner_product"] = is_inner
            write_json(partial / MARK, about)
    return folder


def _is_replaceable(folder: Path) -> bool:
    return (folder / MARK).is_file() or (folder.is_dir() and not any(folder.iterdir()))


def programs_of(learner: Learner, features: Features, *, is_int8: bool) -> dict[str, Program]:
    """The scorer of a learner's task; with the ranking model, or a pretrained one, the encoders."""
    encoder = Encoder(learner.backbone, features, is_int8=is_int8)
    task = next(iter(learner.objectives.values()), None)
    if isinstance(task, PairTask):
        return {task.name: PairScorer(encoder, task, features, is_int8=is_int8)}
    head = head_of(learner)
    programs: dict[str, Program] = {
        "user_encoder": UserEncoder(encoder, head),
        "item_encoder": ItemEncoder(encoder),
    }
    if encoder.items.fields is not None:
        programs["new_item_encoder"] = NewItemEncoder(encoder, features)
    programs["ranking"] = RankingScorer(encoder, head, features, is_int8=is_int8)
    return programs


def _described(program: Program, files: Sequence[Path]) -> dict[str, Any]:
    return {
        "files": [file.name for file in files],
        "inputs": [port.described() for port in program.inputs],
        "outputs": [program.output.described()],
    }

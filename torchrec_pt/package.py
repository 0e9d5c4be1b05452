"""A finished run as a folder to hand on: what serving needs, a model card, nothing of training.

<out>/README.md              the model card
<out>/config.json            the configuration, without this machine's paths
<out>/prepared/              the prepared dataset
<out>/<stage>/               result.json and the best checkpoint of each finished stage
<out>/evaluate/result.json   where the run was evaluated
"""

from __future__ import annotations

from pathlib import Path

from torchrec_pt.config import RunConfig
from torchrec_pt.data.atomic import whole_or_nothing
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.files import link_file, link_files, write_json
from torchrec_pt.model_card import write_card
from torchrec_pt.runs import finished_stages, load_run_config, served_stage


def export_package(run_dir: str | Path, out: str | Path) -> Path:
    """Make `out`, which `Recommender.from_pretrained` takes on any machine; by one process.

    It appears whole or not at all. Files are hard links where the disk is the same: neither a
    run nor a package writes into a file that stands.

    Raises:
        ValueError: no finished run there, `out` exists, or no space, no permission.
    """
    run_dir, out = Path(run_dir), Path(out)
    config = load_run_config(run_dir)
    dataset = PreparedDataset.load(config.prepared_dir)
    served_stage(config, dataset)
    if out.exists():
        raise ValueError(f"{out}: exists; remove it, or give another folder")
    with whole_or_nothing(out) as partial:
        _fill(partial, config, dataset)
    return out


def _fill(folder: Path, config: RunConfig, dataset: PreparedDataset) -> None:
    packaged = _without_paths(config)
    write_json(folder / "config.json", packaged.model_dump(mode="json"))
    link_files(config.prepared_dir, folder / "prepared")
    for name, stage in finished_stages(config, dataset).items():
        checkpoint = stage.checkpoint.relative_to(stage.folder)
        link_files(stage.checkpoint, folder / name / checkpoint)
        link_file(stage.folder / "result.json", folder / name / "result.json")
    evaluated = config.run_dir / "evaluate/result.json"
    if evaluated.is_file():
        link_file(evaluated, folder / "evaluate/result.json")
    write_card(folder / "README.md", config, dataset, packaged)


def _without_paths(config: RunConfig) -> RunConfig:
    """Where the data and other runs were is of this machine alone; their names stay.

    A stage's fingerprint knows another run's model by its digest, which result.json holds.
    """
    data = config.data.model_copy(update={"path": Path(config.data.path.name), "prepared": None})
    evaluate, pretrain, finetune = config.evaluate, config.pretrain, config.finetune
    if evaluate.candidates is not None and evaluate.candidates.path is not None:
        name = Path(evaluate.candidates.path.name)
        candidates = evaluate.candidates.model_copy(update={"path": name})
        evaluate = evaluate.model_copy(update={"candidates": candidates})
    if pretrain is not None and pretrain.continue_from is not None:
        pretrain = pretrain.model_copy(update={"continue_from": _NOT_HERE})
    if finetune.start_from is not None:
        finetune = finetune.model_copy(update={"start_from": _NOT_HERE})
    return config.model_copy(
        update={
            "run_dir": Path(),
            "data": data,
            "evaluate": evaluate,
            "pretrain": pretrain,
            "finetune": finetune,
        }
    )


_NOT_HERE = Path("another run, not in this package")

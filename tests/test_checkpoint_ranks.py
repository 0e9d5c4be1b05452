"""What two ranks saved comes back on one and on three, in any placement and in any catalogue."""

from __future__ import annotations

import functools
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from torchrec_pt.checkpoint import Checkpoint
from torchrec_pt.data.dataset import PreparedDataset
from torchrec_pt.data.prepare import prepare
from torchrec_pt.distributed import Ranks, joined_ranks
from torchrec_pt.item_rows import match_rows, per_item

WORKER = Path(__file__).parent / "checkpoint_ranks.py"

ROW_WISE = {"placement": "row_wise", "optimizer": "rowwise_adagrad"}
# saved as -> loaded into, with the same optimizer
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "replicated": ({"placement": "replicated"}, {}),
    "row_wise into table_wise": (ROW_WISE, {"placement": "table_wise"}),
    "column_wise into row_wise": (
        {"placement": "column_wise", "optimizer": "adagrad"},
        {"placement": "row_wise"},
    ),
    "table_wise into column_wise": (
        {"placement": "table_wise", "optimizer": "adagrad"},
        {"placement": "column_wise"},
    ),
    "row_wise into replicated": (
        {"placement": "row_wise", "optimizer": "sgd"},
        {"placement": "replicated", "optimizer": "adamw"},
    ),
}


def _write_grown(path: Path) -> None:
    """A log over the items i45, i44, … i5: other items, in another order."""
    draw = random.Random(1)
    lines = ["user_id\titem_id\trating\ttimestamp"]
    for user in range(25):
        for time in range(10):
            lines.append(f"u{user}\ti{45 - draw.randrange(41)}\t3\t{time}")
    path.write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = tmp_path_factory.mktemp("grown")
    _write_grown(folder / "log.tsv")
    prepare(tiny_config(folder).data, folder / "prepared", 0)
    return PreparedDataset.load(folder / "prepared")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with joined_ranks() as ranks:
        yield ranks


@pytest.fixture(scope="module")
def folder(
    cycle: PreparedDataset, grown: PreparedDataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """With what two ranks saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    cases = {}
    for name, (table, into) in CASES.items():
        # Two shards of at least 128 columns
        dim = 256 if "column" in name else 16
        model = {"dim": dim, "num_layers": 1, "max_length": 8, "item_table": table}
        config = tiny_config(folder, model=model).model_dump(mode="json")
        cases[name] = {"config": config, "into": into}
    (folder / "cases.json").write_text(json.dumps(cases))
    _run(2, "save", folder, cycle, grown)
    shutil.copytree(folder / "row_wise into table_wise/saved", folder / "damaged")
    for shard in (folder / "damaged").glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    return folder


@pytest.fixture(scope="module")
def load(folder: Path, cycle: PreparedDataset, grown: PreparedDataset) -> Callable[[int], None]:
    return functools.cache(lambda num_ranks: _run(num_ranks, "load", folder, cycle, grown))


def _run(
    num_ranks: int, what: str, folder: Path, cycle: PreparedDataset, grown: PreparedDataset
) -> None:
    launcher = [sys.executable]
    if num_ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node", str(num_ranks)]
    paths = [str(cycle.path), str(grown.path), str(folder), str(folder / "cases.json")]
    command = [*launcher, str(WORKER), what, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_it_is_loaded_into_other_ranks_and_placements_bit_for_bit(
    folder: Path, load: Callable[[int], None], ranks: Ranks, case: str, num_ranks: int
) -> None:
    load(num_ranks)
    saved = Checkpoint.open(folder / case / "saved", ranks)
    loaded = Checkpoint.open(folder / case / f"loaded-{num_ranks}", ranks)
    assert loaded.made_by.endswith(f"world size {num_ranks}")
    assert saved.made_by.endswith("world size 2")
    assert saved.tensors.keys() <= loaded.tensors.keys()
    num = {"replicated": 3, "row_wise into replicated": 1}.get(case, 2)  # the table and its states
    assert len(per_item(saved.tensors)) == num
    for name in saved.tensors:
        assert torch.equal(saved.read(name), loaded.read(name)), name


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_in_another_catalogue_rows_are_those_of_the_same_external_id(
    folder: Path,
    load: Callable[[int], None],
    ranks: Ranks,
    grown: PreparedDataset,
    case: str,
    num_ranks: int,
) -> None:
    load(num_ranks)
    saved, fresh, carried = (
        Checkpoint.open(folder / case / name, ranks)
        for name in ("saved", f"fresh-{num_ranks}", f"grown-{num_ranks}")
    )
    assert carried.is_of(grown.items["external_id"])
    match = match_rows(saved.items, carried.items)
    assert match.num_matched > 15
    assert match.num_new > 5
    assert match.num_dropped > 0
    is_new, known = match.source < 0, match.source[match.source >= 0]
    for name in carried.tensors:
        got = carried.read(name)
        if name not in saved.tensors:
            assert torch.equal(got, fresh.read(name)), name
        elif name in per_item([name]):
            assert len(got) == len(carried.items)
            assert torch.equal(got[~is_new], saved.read(name)[known]), name
            assert torch.equal(got[is_new], fresh.read(name)[is_new]), name
            assert name.startswith("model.") == bool(got[is_new].any()), name
        else:
            assert torch.equal(got, saved.read(name)), name


def test_several_ranks_share_the_writing(folder: Path) -> None:
    names = [path.name for path in sorted((folder / "replicated/saved").glob("*.safetensors"))]
    assert names == ["shard-00000-00000.safetensors", "shard-00001-00000.safetensors"]


def test_one_ranks_full_disk_is_told_alike_by_all(folder: Path) -> None:
    said = json.loads((folder / "full.json").read_text())
    assert said[0].startswith(f"{folder}/full/step-00000000: cannot be written, No space left")
    assert said == [said[0]] * 2
    assert not list((folder / "full").iterdir())


def test_damage_is_named_alike_by_all_ranks(folder: Path, load: Callable[[int], None]) -> None:
    load(3)
    said = json.loads((folder / "damaged-3.json").read_text())
    assert "damaged or missing" in said[0]
    assert said == [said[0]] * 3

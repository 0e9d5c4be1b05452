"""The configuration: what is accepted, what a mistake is told, and what the digest covers."""

from __future__ import annotations

import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from pydantic import ValidationError

from torchrec_pt import config_file
from torchrec_pt.config import LeaveOneOutSplit, RunConfig, Section, TransformerConfig
from torchrec_pt.config_file import ConfigError, load_config

ROOT = Path(__file__).parents[1]
BASE = """
run_dir = "runs/x"
[data]
format = "csv"
path = "log.csv"
"""
OBJECTIVE = '[[pretrain.objectives]]\nname = "masked_item"\n'


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def _line(path: Path, *overrides: str) -> str:
    """The message of the error, without the file's name where it stands in front."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[model]\ndimm = 8", 'model.dimm: unknown key; did you mean "dim"?'),
        ("[modell]\ndim = 8", 'modell: unknown key; did you mean "model"?'),
        (
            "[show]\nzzz = 8",
            "show.zzz: unknown key; known: user, k, title",
        ),
        (
            "[model]\ndimm = 8\nhed = 2",
            'model.dimm: unknown key; did you mean "dim"? (and 1 more)',
        ),
        (
            '[model]\nattention = "causl"',
            'model.attention: unknown value "causl"; did you mean "causal"?',
        ),
        (
            '[data.split]\nrule = "nope"',
            'data.split: unknown value "nope"; choose one of leave_one_out, temporal, ratio, given',
        ),
        ("[data.split]\nvalid = 0.1", "data.split: lacks 'rule', which says what it is"),
        (
            '[data.split]\nrule = "temporal"\ntest_from = 1',
            "data.split.valid_from: required, but missing; add it",
        ),
        (
            '[data.split]\nrule = "ratio"\nvalidd = 0.2',
            'data.split.validd: unknown key; did you mean "valid"?',
        ),
        (
            '[data.split]\nrule = "ratio"\nvalid = 0.5\ntest = 0.5',
            "data.split: valid + test must be below 1, else nothing is left to train on",
        ),
        (
            '[data.split]\nrule = "temporal"\nvalid_from = 2\ntest_from = 2',
            "data.split: valid_from must be smaller than test_from",
        ),
        (
            '[model]\ndim = "wide"',
            "model.dim: input should be a valid integer, unable to parse string as an integer, "
            "given 'wide'",
        ),
        ("[model]\ndim = 12", "model.dim: input should be a multiple of 8, given 12"),
        (
            "[model]\ndim = 64\nnum_heads = 3",
            "model: dim (64) must be a multiple of num_heads (3)",
        ),
        (
            OBJECTIVE + OBJECTIVE,
            'pretrain: objective "masked_item" is given twice; merge the two',
        ),
        (
            '[[data.features]]\ncolumn = "age"\nof = "user"\nkind = "numeric"\nencoder = "e5"',
            "data.features[0]: an encoder is for the texts of users and items, age is numeric of "
            "user; drop the encoder",
        ),
        (
            "[evaluate]\ncandidates = { nun = 99 }",
            'evaluate.candidates.nun: unknown key; did you mean "num"?',
        ),
        (
            "[evaluate]\ncandidates = { num = 0 }",
            "evaluate.candidates.num: input should be greater than or equal to 1, given 0",
        ),
        (
            "[evaluate]\ncandidates = {}",
            "evaluate.candidates: needs num, to draw candidates, or path, to read them; give one",
        ),
        (
            '[evaluate]\ncandidates = { num = 9, path = "c.parquet" }',
            "evaluate.candidates: needs num, to draw candidates, or path, to read them; give one",
        ),
        (
            '[evaluate]\ncandidates = { seed = 1, path = "c.parquet" }',
            "evaluate.candidates: seed is of drawn candidates; leave it out beside path",
        ),
        ("[finetune.ranking]\nlos = 1", 'finetune.ranking.los: unknown key; did you mean "loss"?'),
        (
            '[finetune.ctr.transfer]\nfreeze = "backbone"\nlayer_decay = 0.5',
            'finetune.ctr.transfer: freeze = "backbone" keeps all of the backbone as it is; '
            "drop layer_decay",
        ),
        (
            '[finetune.ctr.transfer]\nlinear_probe = true\nfreeze = "item_table"',
            "finetune.ctr.transfer: linear_probe keeps all of the backbone as it is; drop freeze",
        ),
        (
            "[finetune.ctr]\nhidden_dims = [8]\ntransfer = { linear_probe = true }",
            "finetune.ctr: transfer.linear_probe wants a linear head; drop hidden_dims",
        ),
        (
            '[finetune.ranking]\nhead = "inner"\ntransfer = { linear_probe = true }',
            "finetune.ranking: transfer.linear_probe wants a linear head; drop head",
        ),
        (
            OBJECTIVE + '[finetune]\nstart_from = "runs/y/pretrain"',
            "top level: finetune.start_from takes the place of pretraining; drop it, or drop "
            "[pretrain]",
        ),
    ],
)
def test_a_mistake_gets_one_line_that_says_where_and_what_to_do(
    toml: Path, text: str, line: str
) -> None:
    toml.write_text(BASE + text)
    assert _line(toml) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '[[pretrain.objectives]]\nname = "contrastve"',
            'pretrain.objectives[0]: unknown value "contrastve"; did you mean "contrastive"?',
        ),
        (
            OBJECTIVE + "mask_fractoin = 0.1",
            'pretrain.objectives[0].mask_fractoin: unknown key; did you mean "mask_fraction"?',
        ),
    ],
)
def test_one_mistake_in_an_objective_is_counted_once(toml: Path, text: str, line: str) -> None:
    toml.write_text(BASE + text)
    assert _line(toml) == line


def test_a_mistake_in_an_objective_names_its_neighbour(toml: Path) -> None:
    toml.write_text(BASE + '[[pretrain.objectives]]\nname = "contrastve"')
    assert _line(toml).startswith(
        'pretrain.objectives[0]: unknown value "contrastve"; did you mean "contrastive"?'
    )


def test_a_missing_section_is_named(toml: Path) -> None:
    toml.write_text('run_dir = "x"')
    assert _line(toml) == "data: required, but missing; add it"


def test_an_unreadable_file_and_bad_toml_are_one_line(toml: Path) -> None:
    assert _line(toml) == "cannot be read (No such file or directory); check the path"
    toml.write_text("run_dir =")
    assert re.fullmatch(r"not valid TOML: .+", _line(toml))
    toml.write_bytes(b'run_dir = "\xff"')
    assert re.fullmatch(r"not valid TOML: .+", _line(toml))


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.dim", 'want key.path=value, such as "pretrain.epochs=3"'),
        ("model..dim=8", 'want key.path=value, such as "pretrain.epochs=3"'),
        ("=8", 'want key.path=value, such as "pretrain.epochs=3"'),
        ("run_dir.x=8", '"run_dir" has no keys below it'),
        ("pretrain.objectives.1.weight=2", '"1" is no index of a list of 1'),
        ("pretrain.objectives.first.weight=2", '"first" is no index of a list of 1'),
        ("pretrain.objectives.0.name.x=2", '"name" has no keys below it'),
    ],
)
def test_a_bad_override_is_told_why(toml: Path, override: str, reason: str) -> None:
    toml.write_text(BASE + OBJECTIVE)
    assert _line(toml, override) == f"--set {override}: {reason}"


def test_an_override_of_an_unknown_key_names_its_neighbour(toml: Path) -> None:
    toml.write_text(BASE)
    assert _line(toml, "model.dimm=8") == 'model.dimm: unknown key; did you mean "dim"?'


def test_overrides_reach_lists_and_absent_sections_and_take_bare_words(toml: Path) -> None:
    toml.write_text(BASE + OBJECTIVE)
    config = load_config(
        toml,
        [
            "pretrain.objectives.0.weight=2",
            "pretrain.epochs = 3",
            "model.attention=causal",
            'data.path="a=b.csv"',
            "evaluate.ks=[1, 3]",
            "finetune.ranking.loss=bpr",
        ],
    )
    assert config.pretrain is not None
    assert config.finetune.ranking is not None
    assert config.pretrain.objectives[0].weight == 2
    assert config.pretrain.epochs == 3
    assert config.model.attention == "causal"
    assert config.data.path == Path("a=b.csv")
    assert config.evaluate.ks == (1, 3)
    assert config.finetune.ranking.loss == "bpr"


def test_the_last_of_two_overrides_holds(toml: Path) -> None:
    toml.write_text(BASE)
    assert load_config(toml, ["seed=1", "seed=2"]).seed == 2


def test_a_short_file_gets_the_documented_defaults(toml: Path) -> None:
    toml.write_text(BASE)
    config = load_config(toml)
    assert config.seed == 0
    assert config.prepared_dir == Path("runs/x/prepared")
    assert config.pretrain is None
    assert config.finetune.ranking is None
    assert config.data.split == LeaveOneOutSplit()
    assert (config.model.dim, config.model.attention) == (64, "bidirectional")
    assert config.evaluate.ks == (5, 10, 20)
    assert load_config(toml, ["data.prepared=elsewhere"]).prepared_dir == Path("elsewhere")


def test_a_configuration_cannot_be_changed(toml: Path) -> None:
    toml.write_text(BASE)
    with pytest.raises(ValidationError):
        load_config(toml).seed = 3


def test_the_digest_is_that_of_the_values_not_of_their_spelling(toml: Path) -> None:
    toml.write_text(BASE + "[model]\nnum_heads = 2\ndim = 64\n")
    spelt_out = load_config(toml)
    toml.write_text(BASE)
    defaults = load_config(toml)
    assert spelt_out.digest() == defaults.digest()
    assert RunConfig.model_validate_json(defaults.model_dump_json()).digest() == defaults.digest()


class _Pair(Section):
    b: Path
    a: float = 0.5


def test_the_digest_is_the_same_in_every_process_and_release() -> None:
    # Finished stages of earlier runs are recognized by it.
    assert _Pair(b=Path("x")).digest() == "215e7c1e964f21a5"


def test_any_changed_value_changes_the_digest() -> None:
    base = TransformerConfig()
    other = {
        "dim": 32,
        "num_layers": 3,
        "num_heads": 4,
        "ffn_dim": 7,
        "max_length": 9,
        "attention": "causal",
        "positions": "rotary",
        "dropout": 0.3,
        "similarity": "cosine",
        "item_content": False,
        "row_dropout": 0.1,
        "item_table": {"placement": "row_wise"},
    }
    assert other.keys() == TransformerConfig.model_fields.keys() - {"backbone"}
    digests = {TransformerConfig(**{name: value}).digest() for name, value in other.items()}
    assert len(digests | {base.digest()}) == len(other) + 1


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    load_config(path)


def test_python_3_10_reads_toml_by_tomli_which_is_required_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    required = (ROOT / "requirements/base.txt").read_text()
    assert re.search(r'^tomli==[\d.]+; python_version < "3.11"$', required, re.MULTILINE)
    # tomllib is tomli under another name, so it can stand in for it.
    monkeypatch.setitem(sys.modules, "tomli", config_file.tomllib)
    monkeypatch.setitem(sys.modules, "tomllib", None)
    source = Path(str(config_file.__file__))
    spec = spec_from_file_location("config_of_3_10", source)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    monkeypatch.setattr(sys, "version_info", (3, 10, 0, "final", 0))
    spec.loader.exec_module(module)
    assert module.tomllib is config_file.tomllib

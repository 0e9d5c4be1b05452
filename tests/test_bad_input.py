"""Whatever is wrong with the input is one line on the screen, and nothing half-done stays.

All of it through the command line, as a user meets it.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch

from torchrec_pt import cli, pipeline
from torchrec_pt.data.dataset import PreparedDataset

HEADER = "user_id,item_id,rating,timestamp\n"
ROWS = [(f"u{user}", f"i{(3 * user + n) % 7}", n % 5 + 1, n) for user in range(5) for n in range(4)]
GOOD = HEADER + "".join(f"{user},{item},{rating},{time}\n" for user, item, rating, time in ROWS)
NEXT = GOOD.count("\n") + 1  # the number of a line that is added

COLUMNS = '[data.columns]\nrating = "rating"\ntimestamp = "timestamp"\n'
PRETRAIN = '[pretrain]\nepochs = 0\nobjectives = [{ name = "masked_item" }]\n'
MODEL = "[model]\ndim = 8\nnum_layers = 1\nmax_length = 8\n"


@dataclass(frozen=True)
class Done:
    """What a call left: its exit code and the lines on the screen."""

    code: int
    said: list[str]
    complained: list[str]


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """torchrec-pt with these arguments; what its threads and libraries print counts too."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr("sys.argv", ["torchrec-pt", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        screen = capfd.readouterr()
        return Done(code, screen.out.splitlines(), screen.err.splitlines())

    return run


@dataclass(frozen=True)
class Run:
    """A folder with a log and run.toml, as a user has them."""

    folder: Path
    format: str = "csv"

    @property
    def log(self) -> Path:
        return self.folder / f"log.{self.format}"

    def configure(self, data: str = "", *, columns: str = COLUMNS, more: str = PRETRAIN) -> Path:
        path = self.folder / "run.toml"
        path.write_text(
            f'run_dir = "{self.folder / "run"}"\n'
            f'[data]\nformat = "{self.format}"\npath = "{self.log}"\n{data}\n{columns}{MODEL}{more}'
        )
        return path

    def left(self) -> set[str]:
        """Every file but the user's own."""
        files = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return files - {"run.toml", self.log.name, "run"}


def refusal(call: Call, run: Run, stage: str = "prepare") -> str:
    """The one line that is said about a mistake, without the program's name."""
    done = call(stage, run.folder / "run.toml")
    assert done.code == 2
    assert not done.said
    (line,) = done.complained
    assert line.startswith("torchrec-pt: ")
    # The resolved configuration is whole, and no stage takes it for data.
    assert run.left() <= {"run/config.json"}
    return line.removeprefix("torchrec-pt: ")


def assert_prepares(call: Call, run: Run) -> PreparedDataset:
    done = call("prepare", run.folder / "run.toml")
    assert (done.code, done.complained) == (0, [])
    tables = ["manifest.json"] + [
        f"{name}.parquet" for name in ("interactions", "items", "users", "vocabulary")
    ]
    assert run.left() == {
        "run/config.json",
        "run/prepared",
        *(f"run/prepared/{name}" for name in tables),
    }
    return PreparedDataset.load(run.folder / "run/prepared")


# --- the log ------------------------------------------------------------------------------------

MEND = "mend or remove it"
LOGS = {
    "0 bytes": ("", "must hold interactions, is empty; remove or replace it"),
    "header only": (HEADER, "must hold interactions, has none; check data.path"),
    "a missing column": (
        GOOD.replace("rating", "ratng"),
        'no column "rating", which data.columns.rating names; it has user_id, item_id, ratng, '
        'timestamp; did you mean "ratng"?',
    ),
    "another separator": (
        GOOD.replace(",", ";"),
        'no column "user_id", which data.columns.user names; it has '
        "user_id;item_id;rating;timestamp; name one of them",
    ),
    "a row too long": (
        GOOD + "u1,i1,3,9,9\n",
        f"line {NEXT}: must have 4 fields, has 5; mend or remove the line",
    ),
    "a row too short": (
        GOOD + "u1,i1,3\n",
        f"line {NEXT}: must have 4 fields, has 3; mend or remove the line",
    ),
    "cut within a row": (
        GOOD[: GOOD.rindex(",")],
        f"line {NEXT - 1}: must have 4 fields, has 3; mend or remove the line",
    ),
    "a rating abc": (
        GOOD + "u1,i1,abc,9\n",
        f'line {NEXT}, column "rating": must be a finite number, found "abc"; {MEND}',
    ),
    "a rating nan": (
        GOOD + "u1,i1,nan,9\n",
        f'line {NEXT}, column "rating": must be a finite number, found "nan"; {MEND}',
    ),
    "no rating": (
        GOOD + "u1,i1,,9\n",
        f'line {NEXT}, column "rating": must be a finite number, is empty; {MEND}',
    ),
    "no user": (
        GOOD + ",i1,3,9\n",
        f'line {NEXT}, column "user_id": must be an id, is empty; {MEND}',
    ),
    "line breaks in a cell": (
        GOOD + 'u1,i1,"3\n\n",9\n' + 'u1,i1,"a\nb",9\n',
        f'line {NEXT + 3}, column "rating": must be a finite number, found "a\\nb"; {MEND}',
    ),
    "a lone quote": (
        GOOD + 'u1,12" tape,3,9\n',
        f'line {NEXT}: quotes must come in pairs, found 1; write a cell like 12" tape as '
        '"12"" tape"',
    ),
    "an open quote": (
        GOOD + 'u1,"i1,3,9\n',
        f"after line {NEXT - 1}: not valid CSV, unexpected end of data; check the quotes",
    ),
}


@pytest.mark.parametrize("case", LOGS)
def test_a_bad_log_is_named_by_line_and_its_mended_form_is_taken(
    call: Call, tmp_path: Path, case: str
) -> None:
    text, expected = LOGS[case]
    run = Run(tmp_path)
    run.configure()
    run.log.write_text(text)
    said = refusal(call, run)
    assert said.startswith(str(run.log))
    assert said.removeprefix(str(run.log)).lstrip(",: ") == expected

    run.log.write_text(GOOD)
    assert assert_prepares(call, run).num_users == 5


def test_a_bad_log_leaves_the_dataset_of_an_earlier_run_as_it_was(
    call: Call, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.configure()
    run.log.write_text(GOOD)
    before = assert_prepares(call, run).manifest
    run.log.write_text(GOOD + "u1,i1,nan,9\n")
    assert call("prepare", tmp_path / "run.toml").code == 2
    assert PreparedDataset.load(tmp_path / "run/prepared").manifest == before


def test_a_log_that_is_no_text_is_one_line(call: Call, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.configure()
    run.log.write_bytes(GOOD.encode("utf-16"))
    assert refusal(call, run) == f"{run.log}, line 1: must be UTF-8; convert the file"
    run.log.write_bytes(GOOD.encode() + "u1,é,3,9\n".encode("latin-1"))
    assert refusal(call, run) == f"{run.log}, line {NEXT}: must be UTF-8; convert the file"
    run.log.unlink()
    assert refusal(call, run) == f"data.path: {run.log} does not exist; check the path"


def write_parquet(path: Path, ratings: Any = None) -> bytes:
    users, items, _, times = zip(*(100 * ROWS), strict=True)
    ratings = [row[2] for row in 100 * ROWS] if ratings is None else ratings
    columns = {"user_id": users, "item_id": items, "rating": ratings, "timestamp": times}
    pl.DataFrame(columns).write_parquet(path, compression="zstd")
    return path.read_bytes()


@pytest.mark.parametrize("damage", ["footer", "middle", "page", "header only", "0 bytes"])
def test_a_damaged_parquet_is_one_line_and_the_whole_one_is_taken(
    call: Call, tmp_path: Path, damage: str
) -> None:
    run = Run(tmp_path, "parquet")
    run.configure()
    whole = write_parquet(run.log)
    # Every column is one zstd frame; the last one is that of the times.
    page = whole.rindex(b"\x28\xb5\x2f\xfd") + 4
    run.log.write_bytes(
        {
            "footer": whole[:-20],
            "middle": whole[: len(whole) // 2],
            "page": whole[:page] + b"\xff" * 9 + whole[page + 9 :],
            "header only": whole[:4],
            "0 bytes": b"",
        }[damage]
    )
    said = refusal(call, run)
    if damage == "0 bytes":
        assert said == f"{run.log}: must hold interactions, is empty; remove or replace it"
    else:
        assert said.startswith(f"{run.log}: cannot be read, parquet: File out of specification: ")
        assert said.endswith("; is the file whole, its quoting closed?")
    run.log.write_bytes(whole)
    assert_prepares(call, run)


@pytest.mark.parametrize("rating", ["abc", float("nan")])
def test_a_bad_rating_in_parquet_is_named_by_row(call: Call, tmp_path: Path, rating: Any) -> None:
    run = Run(tmp_path, "parquet")
    run.configure()
    ratings = [float(row[2]) for row in 100 * ROWS]
    write_parquet(run.log, [*map(type(rating), ratings[:-1]), rating])
    assert refusal(call, run) == (
        f'{run.log}, row {len(ratings)}, column "rating": must be a finite number, '
        f'found "{rating}"; {MEND}'
    )
    write_parquet(run.log)
    assert_prepares(call, run)


# --- the configuration --------------------------------------------------------------------------

CONFIGS = {
    "an unknown key": ({"data": "pth = 3"}, 'data.pth: unknown key; did you mean "path"?'),
    "a bad value": (
        {"more": PRETRAIN + "batch_size = 0\n"},
        "pretrain.batch_size: input should be greater than or equal to 1, given 0",
    ),
    "a bad word": (
        {"data": 'split = { rule = "leave_two_out" }'},
        'data.split: unknown value "leave_two_out"; did you mean "leave_one_out"?',
    ),
    "no TOML": ({"more": "[pretrain"}, "not valid TOML: "),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_configuration_is_named_by_key_and_nothing_is_made(
    call: Call, tmp_path: Path, case: str
) -> None:
    sections, expected = CONFIGS[case]
    run = Run(tmp_path)
    run.log.write_text(GOOD)
    path = run.configure(**sections)
    assert refusal(call, run).startswith(f"{path}: {expected}")
    assert not run.left()
    run.configure()
    assert_prepares(call, run)


def test_a_run_dir_that_is_a_file_is_one_line(call: Call, tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log.write_text(GOOD)
    run.configure()
    (tmp_path / "run").write_text("notes")
    said = refusal(call, run)
    assert said.startswith(f"{tmp_path / 'run/config.json'}: cannot be written, ")
    assert "File exists; check free space and permissions" in said


def test_an_error_of_the_system_that_nobody_expected_is_one_line_unless_debugging(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "whatever the library says", "/mnt/shard-3")

    run = Run(tmp_path)
    path = run.configure()
    monkeypatch.setattr(pipeline, "prepare", fail)
    expected = "/mnt/shard-3: Input/output error; mend that and run the same command again"
    assert refusal(call, run).startswith(expected)
    with pytest.raises(OSError, match="whatever the library says"):
        call("--debug", "prepare", path)


# --- what is no error ---------------------------------------------------------------------------


def notices(call: Call, run: Run) -> list[str]:
    done = call("prepare", run.folder / "run.toml")
    assert (done.code, done.complained) == (0, [])
    summary, *lines = done.said
    assert " interactions in " in summary
    return lines


FEW = (
    "prepare: {} of {} users have fewer than 3 interactions: they train but are not evaluated; "
    "data.filters.user_core = 3 drops them"
)
TWICE = (
    "prepare: {} interactions repeat an earlier one of the same user and item: kept; "
    'data.filters.duplicates = "first" keeps one'
)


def test_users_with_few_interactions_and_repeats_are_noticed_and_dropped_on_demand(
    call: Call, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.configure()
    run.log.write_text(GOOD)
    assert notices(call, run) == []

    run.log.write_text(GOOD + "one,i1,3,1\ntwo,i1,3,1\ntwo,i2,3,2\n")
    assert notices(call, run) == [FEW.format(2, 7)]
    assert notices(call, run) == [FEW.format(2, 7)], "the dataset is there and kept"

    # User u0 once more takes what they took, one user takes one item three times.
    run.log.write_text(GOOD + "u0,i0,1,9\n" + 3 * "same,i1,3,1\n" + "one,i1,3,1\n")
    assert notices(call, run) == [FEW.format(1, 7), TWICE.format(3)]
    data = PreparedDataset.load(tmp_path / "run/prepared")
    only = torch.tensor([data.user_index("one")])
    assert data.history("train").select(only).lengths.tolist() == [1]

    run.configure('filters = { duplicates = "first" }')
    assert notices(call, run) == [FEW.format(2, 7)]
    run.configure('filters = { duplicates = "first", user_core = 3 }')
    assert notices(call, run) == []


@pytest.mark.parametrize(
    ("rows", "filters", "num_users"),
    [
        (["a,i1,3,1", "b,i1,3,1", "b,i2,3,2"], "", 2),
        (["a,i1,3,1"], "", 1),
        (3 * ["a,i1,3,1"] + ["b,i2,3,1"], 'filters = { duplicates = "first" }', 2),
    ],
    ids=["few each", "one row", "only repeats"],
)
def test_a_log_of_which_nobody_can_be_evaluated_is_refused_before_training(
    call: Call, tmp_path: Path, rows: list[str], filters: str, num_users: int
) -> None:
    run = Run(tmp_path)
    path = run.configure(filters)
    run.log.write_text(HEADER + "\n".join(rows) + "\n")
    for stage in ("prepare", "run"):
        assert call(stage, path) == Done(
            2,
            [],
            [
                "torchrec-pt: data.split: leave_one_out needs users with 3 interactions or more, "
                f"none of {num_users} has them; add interactions, loosen data.filters or choose "
                "another rule"
            ],
        )
    assert not [name for name in run.left() if "pretrain" in name]
    run.log.write_text(GOOD)
    assert_prepares(call, run)


def test_candidates_that_cannot_be_read_are_refused_before_training(
    call: Call, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    run.log.write_text(GOOD)
    given = tmp_path / "given.parquet"
    path = run.configure(more=f'{PRETRAIN}[evaluate]\ncandidates = {{ path = "{given}" }}\n')
    refused = f"torchrec-pt: evaluate.candidates.path: there is no file {given}; check the path"
    done = call("run", path)
    assert (done.code, done.complained) == (2, [refused])
    assert not [name for name in run.left() if "pretrain" in name]


def test_a_split_without_test_rows_trains_but_a_whole_run_is_refused_before(
    call: Call, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    path = run.configure('split = { rule = "ratio", valid = 0.2, test = 0 }')
    run.log.write_text(GOOD)
    done = call("run", path)
    assert (done.code, len(done.complained)) == (2, 1)
    expected = f"data.split: ratio leaves no test row of {len(ROWS)}; change the split"
    assert expected in done.complained[0]
    assert not [name for name in run.left() if "pretrain" in name]
    assert call("pretrain", path).code == 0


# --- ids ----------------------------------------------------------------------------------------

IDS = [
    *("007", "7", "-0", "+1", "1e3", "1.0", " 7", "nan", "null", "None", "true", "#1"),
    *("Zoë van der Å", "漢字", "🦊👩‍👩‍👧", "caf\u00e9", "cafe\u0301", "\u200bzero\u00a0width"),
    *('say "hi"', '"', "12,5", "it's", "a;b|c", "back\\slash", "[/b]", "[red]", ":fox:", "{x}"),
    *("two  spaces", "../up", "x" * 5000, "=1+1", "%s", "$HOME", "a::b"),
]


@pytest.mark.parametrize("format", ["csv", "tsv", "parquet"])
def test_ids_pass_through_unharmed(call: Call, tmp_path: Path, format: str) -> None:
    run = Run(tmp_path, format)
    path = run.configure(columns="")
    pairs = [(user, item) for n, user in enumerate(IDS) for item in (IDS + IDS)[n : n + 4]]
    if format == "parquet":
        pl.DataFrame(pairs, ["user_id", "item_id"], orient="row").write_parquet(run.log)
    else:
        with run.log.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="," if format == "csv" else "\t")
            writer.writerows([("user_id", "item_id"), *pairs])
    data = assert_prepares(call, run)
    rows = pl.read_parquet(tmp_path / "run/prepared/interactions.parquet")
    users, items = data.users["external_id"], data.items["external_id"]
    found = zip(users.gather(rows["user"]), items.gather(rows["item"]), strict=True)
    assert list(found) == pairs
    assert users.to_list() == IDS

    for stage in ("pretrain", "export"):
        assert call(stage, path).code == 0
    for what in ("users", "items"):
        exported = pl.read_parquet(tmp_path / f"run/export/{what}.parquet")
        assert sorted(exported["id"]) == sorted(IDS)
    for user in ("007", "[/b]", "🦊👩‍👩‍👧", "x" * 5000):
        done = call("recommend", path, "--user", user, "--k", len(IDS))
        offered = {json.loads(line)["item"] for line in done.said}
        assert offered == set(IDS) - {item for who, item in pairs if who == user}


def test_a_whole_run_shows_ids_and_paths_as_they_are(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "[red] *run* :fox:"
    folder.mkdir()
    run = Run(folder)
    path = run.configure()
    odd = GOOD.removeprefix(HEADER).replace(",i", ",[/i] :bug: ").replace("u0", "[/u0]")
    run.log.write_text(HEADER + odd)
    done = call("run", path)
    assert (done.code, done.complained) == (0, [])
    screen = "\n".join(done.said)
    assert f"all of it is in {folder}/run" in screen
    assert "Recommended to user [/u0]" in screen
    assert "[/i] :bug: " in screen


# --- killed -------------------------------------------------------------------------------------

KILLED = """\
import os
os.fsync = lambda _: os.kill(os.getpid(), 9)  # the first thing to be made sure of
from torchrec_pt import files
files.write_json = lambda *_: None  # but for the configuration
from torchrec_pt.cli import main
main()
"""


def test_what_a_killed_preparation_left_does_not_disturb_the_next(
    call: Call, tmp_path: Path
) -> None:
    run = Run(tmp_path)
    path = run.configure()
    run.log.write_text(GOOD)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "prepare", str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])},
        capture_output=True,
    )
    assert killed.returncode == -9, killed.stderr
    assert {"run/.prepared.partial/users.parquet", "run/.prepared.lock"} <= run.left()
    assert "run/prepared" not in run.left()
    assert_prepares(call, run)


# --- a full disk --------------------------------------------------------------------------------

FULL_DISK = Path(__file__).parent / "full_disk.py"
PAGE_BYTES = 4096  # what a tmpfs gives a file at a time
LONG_RUN = """\
[pretrain]
epochs = 30
validate_every = 15
objectives = [{ name = "masked_item" }]

[finetune.ranking]
epochs = 1
control = "scratch"

[export]
formats = ["parquet", "npy"]
"""


def mounting() -> list[str] | None:
    """What a command that mounts begins with; None where nobody lets us."""
    probe = "mkdir -p {0} && mount -t tmpfs -o size=64k none {0} && umount {0}"
    probe = probe.format(f"/tmp/torchrec_pt_mount_{os.getpid()}")
    for prefix in ([], ["unshare", "-Urm"]):
        try:
            done = subprocess.run([*prefix, "sh", "-c", probe], capture_output=True)
        except FileNotFoundError:
            continue
        if done.returncode == 0:
            return prefix
    return None


def on_disks_of(run: Run, sizes_kib: list[int]) -> list[dict[str, Any]]:
    prefix = mounting()
    if prefix is None:
        pytest.skip("neither root nor unshare -Urm may mount a tmpfs here")
    disk = run.folder / "disk"
    disk.mkdir(exist_ok=True)
    done = subprocess.run(
        [*prefix, sys.executable, FULL_DISK, run.folder / "run.toml", disk, *map(str, sizes_kib)],
        env={**os.environ, "PYTHONPATH": str(FULL_DISK.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_full_disk_is_one_line_wherever_it_ends_and_the_same_command_goes_on(
    tmp_path: Path, everywhere: bool
) -> None:
    run = Run(tmp_path)
    run.log.write_text(GOOD)
    run.configure(more=LONG_RUN)
    (undisturbed,) = on_disks_of(run, [1 << 14])
    assert undisturbed["first"]["code"] == 0, undisturbed["first"]["complained"]
    sizes = {name: -(-size // PAGE_BYTES) for name, size in undisturbed["first"]["left"].items()}
    num_pages = sum(sizes.values())
    before_report = num_pages - sizes["report.html"]
    before_export = before_report - sum(sizes[name] for name in sizes if name.startswith("export/"))
    # Within the dataset, checkpoints, evaluation, exports, the page.
    some = [2, before_report // 4, before_report // 2]
    some += [before_export - 2, before_export - 1, before_report - 3, before_report + 1]
    pages = range(1, num_pages) if everywhere else some

    named = set()
    for disk in on_disks_of(run, [num * PAGE_BYTES >> 10 for num in pages]):
        first, again = disk["first"], disk["again"]
        assert first["code"] == 2, disk
        (line,) = first["complained"].splitlines()
        path, _, rest = line.removeprefix(f"torchrec-pt: {tmp_path}/disk/run/").partition(": ")
        assert rest == (
            "cannot be written, No space left on device; free space and run the same command "
            "again, it resumes"
        )
        named.add(path)
        # Apart from the curves, whose last point may be cut, what is there is whole.
        half_written = {name for name in first["left"] if "partial" in name or ".lock" in name}
        assert not half_written
        assert (again["code"], again["complained"]) == (0, "")
        assert disk["result"] == undisturbed["result"]
    kinds = {"prepared", "pretrain/checkpoints/step-", "evaluate/", "export/", "report.html"}
    assert not [kind for kind in kinds if not any(path.startswith(kind) for path in named)]

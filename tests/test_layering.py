"""Imports point one way, none in a circle, and the library never needs Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import torchrec_pt

ROOT = Path(__file__).parents[1]

# From the bottom to the top. A module or folder may import its own layer and those below it.
# `_C` is the compiled extension.
LAYERS = (
    {
        "config",
        "config_file",
        "placement",
        "rng",
        "distributed",
        "files",
        "events",
        "extension",
        "launch",
        "progress",
        "_C",
        "safetensors_file",
    },
    {"data", "ops", "metrics", "checkpoint", "saver", "item_rows", "conversion", "runs", "trials"},
    {"global_negatives"},
    {"models", "sharding", "ring", "negatives", "int8"},
    {"objectives", "tasks"},
    {"learner", "layer_rates", "optim", "averaging"},
    {
        "build",
        "plan",
        "train",
        "train_pipeline",
        "transfer",
        "transfer_table",
        "scoring",
        "held_out",
        "candidates",
        "baselines",
    },
    {
        "diversity",
        "explanations",
        "export",
        "external_ids",
        "item_filter",
        "model_card",
        "package",
        "pair_predictions",
        "programs",
        "recommender",
        "report",
        "retrieval",
        "served",
        "validation",
    },
    {"stages"},
    {"evaluation", "quantization"},
    {"pipeline"},
    {"tables", "doctor", "checkpoint_commands", "model_commands", "tune"},
    {"cli"},
    {"__main__"},
)
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
CLUSTER_LEVEL = len(LAYERS)

Imports = dict[str, set[str]]


def _modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of the library and of cluster."""
    files = [file for top in ("torchrec_pt", "cluster") for file in (root / top).rglob("*.py")]
    names = [".".join(file.relative_to(root).with_suffix("").parts) for file in files]
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files, strict=True)}


def _imports(root: Path) -> Imports:
    """What each module imports, wherever in the file: our modules in full, others by top name."""
    modules = _modules(root)
    found: Imports = {}
    for module, file in modules.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{module}: relative import"
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    is_module = inner in modules or alias.name == "_C"
                    names.add(inner if is_module else str(node.module))
        is_ours = {name: name.split(".")[0] in ("torchrec_pt", "cluster") for name in names}
        found[module] = {name if is_ours[name] else name.split(".")[0] for name in names}
    return found


def _level(module: str) -> int:
    package, *inner = module.split(".")
    if package == "cluster":
        return CLUSTER_LEVEL
    return LEVEL[inner[0]] if inner else 0  # the package itself: what `import torchrec_pt` costs


def _upward(imports: Imports) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in imports.items()
        for name in sorted(names)
        if name.split(".")[0] in ("torchrec_pt", "cluster") and _level(name) > _level(module)
    ]


def _circle(imports: Imports) -> list[str]:
    """Some modules that import each other in a circle; empty if there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for name in sorted(imports.get(module, ())):
            if circle := visit(name, [*path, module]):
                return circle
        done.add(module)
        return []

    return next((circle for module in imports if (circle := visit(module, []))), [])


def _tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_every_module_has_a_place_and_every_place_a_module() -> None:
    units = {name.split(".")[1] for name in _modules(ROOT) if name.startswith("torchrec_pt.")}
    assert units == LEVEL.keys() - {"_C"}


def test_imports_point_downwards() -> None:
    assert _upward(_imports(ROOT)) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert _circle(_imports(ROOT)) == []


def test_the_library_names_neither_ray_nor_optuna_nor_cluster() -> None:
    for module, names in _imports(ROOT).items():
        if module.startswith("torchrec_pt"):
            assert not {name.split(".")[0] for name in names} & {"ray", "optuna", "cluster"}, module


def test_what_is_built_and_shipped_names_no_test_benchmark_or_script() -> None:
    for module, names in _imports(ROOT).items():
        assert not {name.split(".")[0] for name in names} & {"tests", "benchmarks", "scripts"}, (
            module
        )


# A job of the cluster is what it shows.
OF_THE_CLUSTER = ROOT / "scripts/demo_ray.py"


def test_benchmarks_and_scripts_name_neither_cluster_nor_tests() -> None:
    files = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")]
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                names = {str(node.module)}
            else:
                names = {a.name for a in node.names} if isinstance(node, ast.Import) else set()
            refused = {"tests"} if file == OF_THE_CLUSTER else {"cluster", "tests"}
            assert not {name.split(".")[0] for name in names} & refused, file


def test_no_module_of_the_library_loads_ray_or_cluster() -> None:
    names = sorted(name for name in _modules(ROOT) if name.startswith("torchrec_pt"))
    names.remove("torchrec_pt.__main__")  # runs the command line
    code = f"import importlib, sys\nfor n in {names}: importlib.import_module(n)\n"
    code += "print([n for n in ('ray', 'optuna', 'cluster') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


def test_the_package_and_its_configuration_load_without_torch() -> None:
    code = "import sys, torchrec_pt.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import torchrec_pt.cli", "torchrec_pt.cli"),
        ("from torchrec_pt.models import transformer", "torchrec_pt.models.transformer"),
        ("def late():\n    from torchrec_pt import train", "torchrec_pt.train"),
        ("from cluster.jobs import submit", "cluster.jobs"),
    ],
)
def test_an_import_that_runs_back_is_found(tmp_path: Path, line: str, found: str) -> None:
    root = _tree(
        tmp_path,
        {
            "torchrec_pt/data/batch.py": line,
            "torchrec_pt/models/transformer.py": "from torchrec_pt.data.batch import ITEM",
            "torchrec_pt/train.py": "",
        },
    )
    assert _upward(_imports(root)) == [f"torchrec_pt.data.batch imports {found}"]


def test_a_circle_is_found(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "torchrec_pt/data/a.py": "from torchrec_pt.data import b",
            "torchrec_pt/data/b.py": "from torchrec_pt.data.c import x",
            "torchrec_pt/data/c.py": "import torchrec_pt.data.a",
        },
    )
    names = [f"torchrec_pt.data.{letter}" for letter in "abc"]
    circle = _circle(_imports(root))
    assert circle[0] == circle[-1]
    assert sorted(circle[1:]) == names


def test_no_module_stands_where_a_function_of_the_package_should() -> None:
    modules = {name.split(".")[1] for name in _modules(ROOT) if name.startswith("torchrec_pt.")}
    assert not modules & set(torchrec_pt.__all__)

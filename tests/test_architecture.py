"""The house rules that a machine can check: imports go one way, files stay short, no stranger is named."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each module may import only from those before it.
ORDER = [
    "version", "errors", "launcher", "processes", "config", "data_checks", "checkpoint", "compact_vit", "history",
    "metrics", "calibration", "image_files", "data", "distributions", "ising", "elbo", "barrier", "vit",
    "plain_vit", "assembly", "granularity", "model", "saliency", "coupling", "mask_noise", "guide", "fused",
    "objective", "baseline", "baselines", "run", "predictive", "detection", "datatree", "from_pyro", "posterior",
    "pruning", "footprint", "export", "frontier", "prune_peers", "evaluation", "blame", "augment", "steps",
    "training", "experiment",
]  # fmt: skip
LIBRARY = sorted(path for path in (ROOT / "pyro_isingvit").glob("*.py") if path.stem != "__init__")
SOURCES = [*LIBRARY, *sorted((ROOT / "inference").glob("*.py")), *sorted((ROOT / "analysis").glob("*.py"))]


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_module_has_its_place() -> None:
    assert {path.stem for path in LIBRARY} == set(ORDER)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_imports_go_one_way(path: Path) -> None:
    for name in imported(path):
        assert name.split(".")[0] not in ("inference", "analysis"), f"{path.name} imports {name}"
        if name.startswith("pyro_isingvit."):
            assert ORDER.index(name.split(".")[1]) < ORDER.index(path.stem), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "inference").glob("*.py")), ids=lambda path: path.stem)
def test_inference_does_not_import_analysis(path: Path) -> None:
    assert not any(name.split(".")[0] == "analysis" for name in imported(path))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 430
    assert path.stem != "utils"


def test_every_module_is_tested() -> None:
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    elsewhere = {
        "data_checks",  # test_security, test_numbers
        "blame",  # test_numbers
        "datatree",
        "from_pyro",
        "image_files",
        "assembly",
        "frontier",
        "prune_peers",
        "plain_vit",  # test_peers
        "launcher",  # test_processes
        "version",
        "errors",
        "vit",
        "granularity",
        "run",
        "evaluation",
        "history",
        "baseline",
        "objective",
        "steps",  # test_processes, test_training
        "experiment",
    }  # model, guide, training, scripts
    assert {path.stem for path in LIBRARY} - tests <= elsewhere


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, pyro_isingvit, pyro_isingvit.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_exists() -> None:
    import pyro_isingvit

    for name in pyro_isingvit.__all__:
        assert getattr(pyro_isingvit, name) is not None
    with pytest.raises(AttributeError, match="nope"):
        pyro_isingvit.nope  # noqa: B018

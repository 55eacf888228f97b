"""The house rules that a machine can check: imports go down, no circle in a room, files stay short."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "pyro_isingvit"
# Each room may import only from rooms in the lines above it, and from itself.
FLOORS = [
    {"version"}, {"core"}, {"data", "nets", "predictive"}, {"sharing"}, {"ising"}, {"methods"}, {"runs"}, {"pruning"},
    {"report"}, {"evaluation", "starts"}, {"shareable"}, {"trained"}, {"experiment"}, {"classifier"},
]  # fmt: skip
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in LIBRARY.rglob("*.py") if path.stem != "__init__")
SOURCES = [*MODULES, *sorted((ROOT / "inference").glob("*.py")), *sorted((ROOT / "analysis").glob("*.py"))]


def dotted(path: Path) -> str:
    """The name that a module of the library is imported by, without ``pyro_isingvit``."""
    return ".".join(path.relative_to(LIBRARY).with_suffix("").parts)


NAMES = {dotted(path) for path in MODULES}


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # ``from room import module`` names the module, not the room.
            room = (ROOT / node.module.replace(".", "/")).is_dir() and node.module != LIBRARY.name
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if room else {node.module}
    return names


def neighbours(path: Path) -> set[str]:
    """What a file imports of the library, as ``room.module``."""
    return {name.removeprefix("pyro_isingvit.") for name in imported(path) if name.startswith("pyro_isingvit.")}


def test_every_room_is_on_a_floor() -> None:
    rooms = {path.relative_to(LIBRARY).parts[0].removesuffix(".py") for path in MODULES}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_go_down(path: Path) -> None:
    room = dotted(path).split(".")[0]
    outside = {name.split(".")[0] for name in imported(path)} & {"inference", "analysis"}
    assert not outside, f"{path.name} imports {outside}"
    for name in neighbours(path):
        assert name in NAMES, f"{path.name} imports {name}, which is no module"
        other = name.split(".")[0]
        assert other == room or FLOOR[other] < FLOOR[room], f"{dotted(path)} imports {name}"


def test_no_circle_inside_a_room() -> None:
    TopologicalSorter({dotted(path): neighbours(path) for path in MODULES}).prepare()  # raises CycleError


def test_rooms_do_not_reexport() -> None:
    # A room that imports its modules would load torch for the sake of a registry's names.
    for room in LIBRARY.glob("*/__init__.py"):
        assert len(ast.parse(room.read_text()).body) == 1, room


def test_scripts_and_analysis_import_one_way() -> None:
    for path in sorted((ROOT / "inference").glob("*.py")):
        assert not any(name.split(".")[0] == "analysis" for name in imported(path)), path
    for folder in ("inference", "analysis"):
        modules = {f"{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"}
        TopologicalSorter({name: imported(path) & modules.keys() for name, path in modules.items()}).prepare()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 430
    assert path.stem != "utils"


# Modules without a test that imports them, and what tries them instead.
TRIED_ELSEWHERE = {
    "core.launcher": "core/test_processes.py, through core.processes, and runs/test_torchrun.py",
    "data.files": "data/test_data.py, through data.load",
    "data.given": "test_experiment.py, through what a trained run is asked",
    "evaluation": "inference/test_scripts.py and runs/test_determinism.py, through the runs that they train",
    "runs.session": "runs/test_trainer.py and runs/test_robustness.py, through the trainer",
    "version": "core/test_settings.py, as it stands in config.json",
}


def public_homes(path: Path) -> set[str]:
    """Modules behind the public names that a file imports from the package itself."""
    stub = ast.parse((LIBRARY / "__init__.pyi").read_text()).body
    homes = {node.names[0].name: node.module for node in stub if isinstance(node, ast.ImportFrom)}
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in nodes if node.module == "pyro_isingvit" for alias in node.names}
    return {str(homes[name]) for name in names & homes.keys()}


def test_every_module_has_a_test() -> None:
    tried = {name for path in (ROOT / "tests").rglob("*.py") for name in neighbours(path) | public_homes(path)}
    assert NAMES - tried <= TRIED_ELSEWHERE.keys() <= NAMES, "import a module in its test, or say what tries it"
    for where in TRIED_ELSEWHERE.values():
        assert all((ROOT / "tests" / file).is_file() for file in re.findall(r"\w+/\w+\.py", where)), where


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, pyro_isingvit, pyro_isingvit.core.settings, pyro_isingvit.methods.registry; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_wheel_says_that_it_is_typed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert (LIBRARY / "py.typed").is_file()  # hatchling packs every file of the package
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["pyro_isingvit"]}
    assert "Typing :: Typed" in project["project"]["classifiers"]


def test_the_paper_has_one_address() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["urls"]["Paper"] in (ROOT / "CITATION.cff").read_text()
    assert project["urls"]["Paper"] in (ROOT / "README.md").read_text()


def test_every_public_name_exists() -> None:
    import pyro_isingvit

    assert "fit" in pyro_isingvit.__all__
    for name in pyro_isingvit.__all__:
        assert getattr(pyro_isingvit, name) is not None
    with pytest.raises(AttributeError, match="nope"):
        pyro_isingvit.nope  # noqa: B018

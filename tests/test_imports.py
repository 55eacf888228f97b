"""Importing is quick: what is large is loaded where it is used. Modules are counted, not seconds."""

import subprocess
import sys

import pytest
from helpers import ROOT

LARGE = (
    "lightning_fabric", "torchvision", "torchmetrics", "matplotlib", "arviz", "arviz_base", "xarray", "netCDF4",
    "sklearn", "pandas", "scipy", "jinja2", "tyro", "rich", "torch._dynamo",
)  # fmt: skip


def loaded(code: str) -> set[str]:
    """Names in ``sys.modules`` of a fresh process that ran ``code``."""
    told = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(told.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        "import pyro_isingvit",
        "import pyro_isingvit; dir(pyro_isingvit); pyro_isingvit.__version__",
        "from pyro_isingvit import TrainConfig, IsingConfig, ViTConfig, UserError",
        "import pyro_isingvit.methods.registry",
    ],
)
def test_names_and_settings_load_no_torch(code: str) -> None:
    modules = loaded(code)
    assert not modules & {"torch", "pyro", "numpy", *LARGE}
    assert len(modules) < 200  # about 90: nobody imports something else that is large


@pytest.mark.parametrize(
    "code",
    [
        "import pyro_isingvit.experiment",
        "from pyro_isingvit import fit, load_run, ImageData, load_data, draw_predictive, compact, TrainedRun",
    ],
)
def test_the_door_loads_torch_and_pyro_alone(code: str) -> None:
    modules = loaded(code)
    assert {"torch", "pyro"} <= modules
    assert modules & set(LARGE) == set()


def test_a_classifier_loads_scikit_learn_and_nothing_for_figures() -> None:
    modules = loaded("from pyro_isingvit import IsingViTClassifier")
    assert "sklearn" in modules and not modules & {"matplotlib", "lightning_fabric", "torchvision", "xarray", "jinja2"}

"""The example of docs/deploy.md, which a reader without this package runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from helpers import INFO, TINY, around, make_pair

from pyro_isingvit import PredictiveDraws, compact, export_members

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"


def test_the_example_without_this_package(tmp_path: Path) -> None:
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "InferenceSession" in code
    ]
    torch.manual_seed(0)
    model, guide = make_pair(vit=TINY, granularity="unit")
    bayes, images = compact(around(model, guide), "bayes"), np.arange(64, dtype=np.uint8).reshape(4, 1, 4, 4)
    export_members(bayes, tmp_path / "members.onnx", 4)
    np.save(tmp_path / "images.npy", images)
    refuse = "import sys\nfor name in ('torch', 'pyro_isingvit'):\n    sys.modules[name] = None\n"
    keep = "\nnp.savez('found.npz', probabilities=probabilities, mutual_information=mutual_information)\n"
    done = subprocess.run(
        [sys.executable, "-c", refuse + code + keep], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(images) and any(name in done.stdout for name in INFO.classes)
    draws, found = PredictiveDraws(bayes.predict(images, 4)), np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["probabilities"], draws.mean, atol=1e-5)
    np.testing.assert_allclose(found["mutual_information"], draws.mutual_information, atol=1e-5)

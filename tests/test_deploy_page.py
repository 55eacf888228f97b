"""The example of docs/deploy.md, which a reader without this package runs."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import INFO, TINY, around, make_pair

from pyro_isingvit import PredictiveDraws, compact, export_members, predict_onnx
from pyro_isingvit.core.errors import UserError

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"


PIXELS = {
    "uint8": np.arange(64, dtype=np.uint8).reshape(4, 1, 4, 4),
    "uint16": np.arange(64, dtype=np.uint16).reshape(4, 1, 4, 4) * np.uint16(1000),
    "float32": np.random.default_rng(0).normal(size=(4, 1, 4, 4)).astype(np.float32),
}


@pytest.mark.parametrize("kind", PIXELS)
@pytest.mark.parametrize("ends", [{}, {"low": (10.0,), "high": (20.0,)}])
def test_the_example_without_this_package(tmp_path: Path, kind: str, ends: dict) -> None:
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "InferenceSession" in code
    ]
    torch.manual_seed(0)
    model, guide = make_pair(vit=TINY, granularity="unit")
    model.info = replace(INFO, kind=kind, **ends)
    bayes, images = compact(around(model, guide), "bayes"), PIXELS[kind]
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
    read = images if kind == "uint8" else images.astype(np.float32)  # those of 16 bits too
    draws, found = PredictiveDraws(bayes.predict(read, 4)), np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["probabilities"], draws.mean, atol=1e-5)
    np.testing.assert_allclose(found["mutual_information"], draws.mutual_information, atol=1e-5)


def test_pixels_of_another_kind_are_refused_by_all(tmp_path: Path) -> None:
    """Floats to 1 would be nearly black among those of 16 bits."""
    torch.manual_seed(0)
    model, guide = make_pair(vit=TINY, granularity="unit")
    model.info = replace(INFO, kind="uint16")
    bayes, images, file = compact(around(model, guide), "bayes"), PIXELS["uint16"], tmp_path / "members.onnx"
    export_members(bayes, file, 2)
    shares = (images / 65535).astype(np.float32)
    unknown = np.where(shares > 0.5, np.nan, 65535 * shares).astype(np.float32)
    below = images.astype(np.float32) - 1
    wrong = ((shares, "not floats to 1"), (unknown, "nan"), (below, "from -1 to"))
    for predict in (bayes.predict, lambda x: predict_onnx(file, x)):
        predict(images.astype(np.float32))  # as images of 16 bits are read
        predict(np.zeros_like(shares))
        for given, told in wrong:
            with pytest.raises(UserError, match=told):
                predict(given)

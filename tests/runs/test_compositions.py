"""Every regulariser with micro-batches, several processes, resumption and bf16: the same run, or a refusal by name."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forks import ranks
from helpers import trainer
from kills import same
from several import config_of, trained

from pyro_isingvit.core.checkpoint import load_checkpoint
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.regularise import REGULARISERS
from pyro_isingvit.data.split import ImageData
from pyro_isingvit.runs.trainer import Trainer

REFUSED = {"parts": {"vne": "whole"}, "bf16": {"nuclear": "bf16"}}  # what cannot be, and a word of the reason
# Teachers, and matrices that are for baselines alone: test_distillation.py and test_reparametrise.py try the same.
ELSEWHERE = {"distillation", "ttm", "sigma-reparam", "weight-compander"}
NAMES = [name for name in REGULARISERS if name not in ELSEWHERE]


def run_of(name: str, data: ImageData, folder: Path | None = None, method: str = "ising", **train: Any) -> Trainer:
    return trainer(data, folder, config_of(name, method, **train))


def assert_alike(ours: list[dict], theirs: list[dict], rel: float = 1e-4) -> None:
    for record, expected in zip(ours, theirs, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=rel)
        assert record["val_nll"] == pytest.approx(expected["val_nll"], rel=10 * rel)


@pytest.mark.parametrize("method", ["ising", "deterministic"])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_give_the_same_run(name: str, method: str, data: ImageData) -> None:
    if name in REFUSED["parts"]:
        with pytest.raises(UserError, match=REFUSED["parts"][name]):
            run_of(name, data, method=method, accumulate=2)
        return
    whole, parts = (run_of(name, data, method=method, accumulate=n, draws=1).fit().history for n in (1, 2))
    assert_alike(parts, whole)


UNITS = ["token-masking", "nested-dropout", "regmixup", "ps-kd", "early-learning", "car", "ridg", "attention-entropy"]


@pytest.mark.parametrize("name", UNITS)
def test_micro_batches_where_every_image_has_masks_of_its_own(name: str, data: ImageData) -> None:
    """The masks are drawn for the whole batch and shared out: the default of the posterior."""
    config = config_of(name)
    config = replace(config, ising=replace(config.ising, granularity="unit"))
    whole, parts = (trainer(data, config=config, accumulate=n, draws="image").fit().history for n in (1, 2))
    assert_alike(parts, whole)


@pytest.mark.parametrize("method", ["ising", "deterministic"])
def test_many_together_give_the_same_run_in_micro_batches(method: str, data: ImageData) -> None:
    together = {
        "jacobian": 0.01, "nuclear_norm": 0.01, "rationale": 0.01, "gradient_norm": 0.01, "confusion": 0.3,
        "mix": "regmixup", "token_masking": 0.25, "label_smoothing": 0.1, "draws": 1,
    }  # fmt: skip
    whole, parts = (
        run_of("logit-penalty", data, method=method, accumulate=n, **together).fit().history for n in (1, 2)
    )
    assert_alike(parts, whole)
    assert {"jacobian", "nuclear_norm", "rationale", "confusion"} <= set(whole[0])


@pytest.mark.parametrize("engine", ["fused", "pyro"])
@pytest.mark.parametrize("name", NAMES)
def test_resumed_equals_uninterrupted_bit_for_bit(name: str, engine: str, data: ImageData, tmp_path: Path) -> None:
    whole = run_of(name, data, tmp_path / "whole", engine=engine).fit()

    def stop(at: Trainer) -> None:
        if at.epoch == 2:
            raise KeyboardInterrupt

    cut = run_of(name, data, tmp_path / "cut", engine=engine)
    cut.on_epoch = stop
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    again = run_of(name, data, tmp_path / "cut", engine=engine)
    again.restore()
    again.fit()
    ours, theirs = (load_checkpoint(tmp_path / each / "checkpoint.pt") for each in ("cut", "whole"))
    assert same({**ours, "seconds": 0}, {**theirs, "seconds": 0})
    assert whole.history == again.run.history


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_finite(name: str, data: ImageData) -> None:
    if name in REFUSED["bf16"]:
        with pytest.raises(UserError, match=REFUSED["bf16"][name]):
            run_of(name, data, precision="bf16")
        return
    for method in ("ising", "deterministic"):
        run = run_of(name, data, method=method, precision="bf16").fit()
        numbers = [value for record in run.history for value in record.values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers))
        assert all(bool(p.isfinite().all()) for p in run.method.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ising", "deterministic"])
def test_two_processes_train_the_run_of_one(method: str, tmp_path: Path) -> None:
    """One pair of processes trains all of them, one after another."""
    done = [process.wait() for process in ranks(2, "several", method, tmp_path / "two.json")]
    assert not any(each.returncode for each in done), "".join(each.stderr for each in done)
    two, one = json.loads((tmp_path / "two.json").read_text()), trained(method)
    assert set(two) == set(one) == set(REGULARISERS)
    for name, history in two.items():
        if name in REFUSED["parts"]:
            assert REFUSED["parts"][name] in history
        elif isinstance(history, str):
            assert name in ELSEWHERE and history == one[name]
        else:
            assert_alike(history, one[name])

"""The comparison of ways to draw the posterior: its rows, and that its variance is one."""

import json
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, trainer

from inference.variance import WAYS, gradient_variance, main
from pyro_isingvit.ising.fused import FusedELBO

SHORT = ["--dataset", "digits", "--train-size", "200", "--depth", "1", "--epochs", "2", "--gradients", "8",
         "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("variance")
    main([*SHORT, "--out", str(out)])
    return json.loads((out / "variance.json").read_text())


def test_every_way_has_a_row(rows) -> None:
    assert [row["way"] for row in rows] == list(WAYS)
    for row in rows:
        assert len(row["val_nll"]) == len(row["seconds"]) == 2 and row["seconds"][0] < row["seconds"][1]
        assert row["variance_of_draw"] > 0 and row["variance_in_all"] > 0


def test_the_goal_is_what_every_way_reaches(rows) -> None:
    goal = rows[0]["goal_nll"]
    assert goal == max(min(row["val_nll"]) for row in rows)
    for row in rows:
        reached = row["epochs_to_goal"]
        assert row["val_nll"][reached - 1] <= goal and all(nll > goal for nll in row["val_nll"][: reached - 1])
        assert row["seconds_to_goal"] == row["seconds"][reached - 1]


def test_variance_is_that_of_the_gradients(data) -> None:
    t = trainer(data, config=CONFIG, epochs=1)
    run = t.fit()
    run.guide.start_masks()
    before = {kind: loc.detach().clone() for kind, loc in run.guide.loc.items()}
    state = torch.get_rng_state()
    found = gradient_variance(t, {"draws": 1}, 5)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[kind], loc) for kind, loc in run.guide.loc.items())
    elbo, size = FusedELBO(run.model, run.guide), t.settings.batch_size
    torch.manual_seed(t.settings.seed)
    each = []
    for _ in range(5):
        loss = elbo(run.info.normalise(t.data.train.images[:size]), t.data.train.labels[:size]) / len(t.data.train)
        each.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(run.guide.loc.values()))]))
    assert found["variance_of_draw"] == pytest.approx(float(torch.stack(each).var(0).sum()), rel=1e-5)


def test_nothing_is_replaced_unasked(tmp_path: Path, capsys) -> None:
    (tmp_path / "variance.json").write_text("[]")
    for flags, message in (([], "--overwrite"), (["--overwrite", "--gradients", "1"], "at least 2"),
                           (["--overwrite", "--val-fraction", "0"], "--val-fraction above 0")):  # fmt: skip
        with pytest.raises(SystemExit) as leave:
            main([*SHORT, "--out", str(tmp_path), *flags])
        assert leave.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "variance.json").read_text() == "[]"

"""The comparison with other libraries: the same network, the same training, and rows for what cannot run."""

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyro
import pytest
import torch
from forks import ROOT, script
from torch.nn import functional as F

from inference import peers
from inference.peer_adapters import METHODS, PEERS, deep_getattr
from inference.peer_network import Clock, Job, decayed, train
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import DataConfig, RunConfig, ViTConfig
from pyro_isingvit.data.load import load_data
from pyro_isingvit.methods.plain import Plain
from pyro_isingvit.methods.registry import METHODS as OWN
from pyro_isingvit.nets.plain import PlainViT
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.runs.trainer import Trainer

SHAPE = ViTConfig(patch_size=2, width=16, heads=2, depth=2, mlp_ratio=2)
TINY = [
    "--dataset",
    "digits",
    "--train-size",
    "200",
    "--epochs",
    "2",
    "--depth",
    "1",
    "--width",
    "16",
    "--samples",
    "3",
]


@pytest.fixture
def job() -> Job:
    settings = replace(
        OWN["deterministic"].train,
        epochs=8,
        lr=5e-3,
        samples=4,
        device="cpu",
        average=0.0,
        rate_rule="uniform",
        weight_decay=0.05,
        hyperspherical_energy=0.0,
    )
    config = RunConfig("digits", "deterministic", DataConfig("digits", train_size=200), SHAPE, train=settings)
    return Job(config, load_data("digits", train_size=200), torch.device("cpu"))


@pytest.mark.parametrize("patch", [2, 3], ids=["divides", "padded"])
def test_the_plain_network_has_our_logits(patch: int) -> None:
    vit = ViT(replace(SHAPE, patch_size=patch), 3, 8, 7, 5)
    for parameter in vit.parameters():  # zeros and ones would hide a bias or a gain in the wrong place
        torch.nn.init.normal_(parameter)
    weights, images = vit.initial_weights(), torch.randn(6, 3, 8, 7)
    plain = PlainViT(vit, dropout=0.5).copy_from(vit, weights).eval()
    torch.testing.assert_close(plain(images), vit(weights, images), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in plain.parameters()) == sum(
        t.numel() for t in (*vit.parameters(), *weights.values())
    )  # fmt: skip


@pytest.mark.parametrize("change", [{"pool": "cls"}, {"head": "mlp"}])
def test_another_pooling_or_head_is_refused(change: dict[str, str]) -> None:
    with pytest.raises(UserError, match="`pool` mean and `head` linear"):
        PlainViT(ViT(replace(SHAPE, **change), 1, 8, 8, 10))


def test_the_plain_loop_is_our_trainer(job: Job) -> None:
    # Same initial weights, batches, schedule, decay and clipping: after 32 steps the same network.
    trainer = Trainer(job.config, job.data, None, False)
    ours = trainer.fit().network
    assert isinstance(ours, Plain)
    network, clock = job.network(), Clock()
    loss = lambda x, y: F.cross_entropy(network(x), y)  # noqa: E731
    train(job, network, decayed(network, job.train), loss, clock)
    images = job.data.info.normalise(job.data.test.images)
    # Logits, not weights: the keys' biases have no gradient but rounding, which AdamW blows up, and no effect.
    with torch.no_grad():
        torch.testing.assert_close(network(images), ours.vit(ours.weights(), images), rtol=1e-3, atol=1e-3)
    assert len(clock.seconds) == len(trainer.epoch_seconds) == 8


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peers' own
        yield
    pyro.clear_param_store()


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.usefixtures("quiet")
def test_each_peer_learns_and_draws(name: str, job: Job) -> None:
    method = METHODS[name]
    pytest.importorskip(method.module)
    linear, pauses, settings = F.linear, [], job.config.train
    clock = Clock(lambda: pauses.append(1))
    predict = method.fit(job, clock)
    probs = predict(job.data.test.images)
    assert probs.shape == (settings.samples, len(job.data.test), 10)
    torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:2]))
    assert (probs[0] - probs[1]).abs().max() > 1e-6  # draws differ
    assert F.nll_loss(probs.mean(0).log(), job.data.test.labels) < 2.2  # log 10 is 2.30
    assert len(clock.seconds) == len(pauses) == settings.epochs
    assert F.linear is linear and not hasattr(pyro.util, "deep_getattr")  # what TyXe patches is as it was


def test_the_shim_is_taken_away() -> None:
    with pytest.raises(ZeroDivisionError), deep_getattr():
        assert pyro.util.deep_getattr(ROOT, "parent.name") == ROOT.parent.name
        1 / 0  # noqa: B018
    assert not hasattr(pyro.util, "deep_getattr")


def test_a_diverged_loss_is_an_error(job: Job) -> None:
    network = job.network()
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(job, network, decayed(network, job.train), lambda x, y: network(x).sum() * float("nan"), Clock())


def test_the_ratio_is_taken_round_by_round() -> None:
    calm, loaded = {"epoch_seconds": [1.0, 1.0, 9.0, 9.0, 9.0]}, {"epoch_seconds": [2.0, 2.0, 2.0, 18.0, 18.0]}
    assert peers.ratio(loaded, calm) == 2.0  # the medians would say 2 / 9
    assert peers.ratio(loaded, {}) is None and peers.ratio({}, calm) is None


class Pipe:
    """The parent's end, which lets every epoch go on."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def recv(self) -> str:
        return "go on"

    def send(self, message: object) -> None:
        self.sent.append(message)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (RuntimeError("broken\nat length"), "failed", "RuntimeError: broken"),
        (ModuleNotFoundError("No module named 'laplace'"), "not installed", "pip install"),
    ],
)
def test_a_peer_that_raises_leaves_a_row(error, status: str, words: str, job: Job, monkeypatch) -> None:
    def fit(job: Job, clock: Clock) -> None:
        for _ in range(2):
            with clock.epoch():
                warnings.warn("a peer's", stacklevel=1)
        raise error

    monkeypatch.setitem(METHODS, "laplace", replace(METHODS["laplace"], fit=fit))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    pipe = Pipe()
    peers.work("laplace", job.config, pipe)  # type: ignore[arg-type]
    assert pipe.sent[:2] == [None, None]
    row = pipe.sent[2]
    assert isinstance(row, dict) and row["status"] == status and words in row["reason"] and "\n" not in row["reason"]


def test_the_script_goes_on_past_peers_that_cannot_run(tmp_path: Path, monkeypatch) -> None:
    """One is not installed, one takes its process down."""
    (tmp_path / "tyxe.py").write_text("raise ImportError(\"No module named 'tyxe'\")")
    (tmp_path / "laplace.py").write_text("import os; os._exit(9)")
    out = tmp_path / "out"
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("tyxe", "laplace")]:
        monkeypatch.delitem(sys.modules, name)
    result = script("inference.peers", *TINY, "--device", "cpu", "--out", out, "--peers", "tyxe", "laplace")
    assert result.returncode == 0, result.stderr
    rows = {row["peer"]: row for row in json.loads((out / peers.RESULTS).read_text())}
    assert list(rows) == ["ising", "deterministic", "tyxe", "laplace"]
    assert rows["tyxe"]["status"] == "not installed" and "pip install" in rows["tyxe"]["reason"]
    assert rows["laplace"]["status"] == "failed" and "died" in rows["laplace"]["reason"]
    for name in ("ising", "deterministic"):
        row = rows[name]
        assert row["status"] == "done" and row["seconds_per_epoch"] > 0 and row["test_size"] == 360
        assert {"accuracy", "nll", "brier", "ece", "nll_calibrated"} <= set(row["metrics"])
    assert rows["ising"]["samples"] == 3 and rows["deterministic"]["samples"] == 1
    assert rows["deterministic"]["ratio"] == 1.0 and rows["tyxe"]["ratio"] is None
    assert "No module named 'tyxe'" in result.stdout and "NLL, T fitted" in result.stdout
    assert [path.name for path in out.iterdir()] == [peers.RESULTS]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peers", "blitz"], "unknown peer 'blitz'; known: tyxe"),
        (["--peers"], "at least one of"),
        (["--peers", "laplace", "laplace"], "distinct"),
        (["--preset", "huge"], "unknown --preset"),
        (["--epochs", "0"], "epochs must be at least 1"),
        (["--dataset", "npz:none.npz"], "none.npz"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], words: str, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(SystemExit) as leave:
        peers.main([*TINY, *arguments, "--out", str(tmp_path / "out")])
    assert leave.value.code == 2 and words in capsys.readouterr().err


def test_no_peer_installed_and_a_result_that_exists(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        peers.main([*TINY, "--out", str(tmp_path)])
    assert "pyro-isingvit[peers]" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    (tmp_path / peers.RESULTS).write_text("[]")
    with pytest.raises(SystemExit):
        peers.main([*TINY, "--out", str(tmp_path)])
    assert "--overwrite" in capsys.readouterr().err


def test_weights_of_images_are_refused(job: Job, monkeypatch) -> None:
    weighed = replace(job.data, train=replace(job.data.train, weights=torch.ones(len(job.data.train))))
    monkeypatch.setattr("pyro_isingvit.data.load.load_data", lambda *_, **__: weighed)
    with pytest.raises(UserError, match="weights of images"):
        peers.check(job.config)

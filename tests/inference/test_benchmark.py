"""The benchmark's cases do what they say, and its results become tables and figures. No test asserts a time."""

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import TINY

from analysis.benchmark import main as draw
from analysis.benchmark import read, spread, table
from inference import benchmark_cases
from inference.benchmark import main as benchmark
from inference.benchmark_cases import Shape, ising_step, plain_network
from inference.benchmark_parts import curves, in_fresh_process, peak_of_draws, variants
from pyro_isingvit.core.settings import IsingConfig, RunConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.methods.registry import METHODS
from pyro_isingvit.pruning.cost import interleaved
from pyro_isingvit.runs.optimiser import make_optimizer, with_decay
from pyro_isingvit.runs.run import build_run

SHAPE = Shape(TINY, batch=6, side=4, classes=3, num_data=60)
SHORT = ["--preset", "digits", "--depth", "1", "--repeats", "3", "--batch-size", "4", "--draws", "2", "--images", "5",
         "--threads", "1", "--no-compiled", "--no-variants", "--no-curves", "--no-memory"]  # fmt: skip


def fails(main, argv: list[str], capsys) -> str:
    """The message of a script that leaves with exit code 2."""
    with pytest.raises(SystemExit) as leave:
        main(argv)
    assert leave.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    benchmark([*SHORT, "--out", str(out), "--profile"])
    return out


def test_results_hold_the_promised_keys(folder) -> None:
    result = json.loads((folder / "benchmark.json").read_text())
    for key in (
        "step_ratio_eager",
        "predictive_ratio",
        "mask_update_share",
        "step_ratio_pyro_engine",
        "step_ratio_unregularised",
    ):
        assert result[key] > 0
    assert result["step_ratio_compiled"] is None and result["peak_memory_mb"] is None  # not asked for
    assert {len(taken) for taken in result["repeats_s"].values()} == {3}
    ratio = result["median_s"]["ising_step"] / result["median_s"]["plain_step"]
    assert result["step_ratio_eager"] == ratio
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["processor"]
    assert "addcmul" in (folder / "profile.txt").read_text()


def test_tables_and_figures(folder, capsys) -> None:
    result = json.loads((folder / "benchmark.json").read_text())

    def turns(cases, label):
        return interleaved(cases, 3, limit_s=0.0)

    result["variants"] = variants(SHAPE, ["weight"], ["gnb"], 10, turns)
    result["curves"] = curves(SHAPE, {"width": (4, 8), "depth": (1,), "batch": (6,), "draws": (1, 2)}, 5, 10, turns)
    row = {"chunk": 256, "samples": 10, "peak_mb": 9.0, "growth_mb": 3.0, "result_mb": 1.0}
    both = {"plain_step": row, "ising_step": row, "images": 5, "draws": 10}
    result["memory"] = both | {"predictive": [row, row | {"samples": 100}]}
    result["peers"] = {"epoch_ratio": {"tyxe": 3.25, "bayesian-torch": None}}
    (folder / "benchmark.json").write_text(json.dumps(result))
    draw(["--results", str(folder)])
    text = (folder / "benchmark.md").read_text()
    assert f"| {result['step_ratio_eager']:.3f} |" in text and result["machine"]["processor"] in text
    assert f"without the default regulariser | {spread(result['repeats_s']['ising_step_unregularised'])}" in text
    assert "| weight | gnb |" in text and "| tyxe | 3.25 |" in text and "| bayesian-torch | not installed |" in text
    printed = capsys.readouterr().out
    assert all((folder / f"{name}.png").is_file() and name in printed for name in ("steps", "scaling", "memory"))
    assert [row["width"] for row in result["curves"]["width"]] == [4, 8]
    weights = [row["weights"] for row in result["curves"]["width"]]
    assert weights[1] > weights[0]


def test_the_steps_use_the_optimiser_and_schedule_of_training(monkeypatch) -> None:
    made: list[torch.optim.Optimizer] = []

    def remembered(groups, settings):
        made.append(make_optimizer(groups, settings))
        return made[-1]

    monkeypatch.setattr(benchmark_cases, "make_optimizer", remembered)
    ours, plain = ising_step(SHAPE), benchmark_cases.plain_step(SHAPE)
    ours.step()
    plain()
    one_rate = replace(METHODS["deterministic"].train, rate_rule="uniform", lr=benchmark_cases.LR)
    one_rate = with_decay(one_rate, math.ceil(SHAPE.num_data / SHAPE.batch))
    config = RunConfig(vit=TINY, method="deterministic", train=one_rate)
    trained = build_run(config, SHAPE.info, SHAPE.num_data).method.parameter_groups(config.train)
    assert [group["weight_decay"] for group in made[1].param_groups] == [g["weight_decay"] for g in trained[:2]]
    assert len(made[0].param_groups) == len(ours.run.method.parameter_groups(TrainConfig()))
    warmup = int(TrainConfig().warmup_fraction * TrainConfig().epochs * SHAPE.num_data / SHAPE.batch)
    for optimizer in made:  # after one step of the schedule
        assert optimizer.param_groups[0]["lr"] == pytest.approx(benchmark_cases.LR * 2 / warmup)


def test_a_step_moves_the_weights() -> None:
    ours = ising_step(SHAPE)
    before = {kind: loc.detach().clone() for kind, loc in ours.run.guide.loc.items()}
    ours.step()
    assert all(not torch.equal(before[kind], loc) for kind, loc in ours.run.guide.loc.items())


def test_an_update_comes_every_ten_steps() -> None:
    ours = ising_step(SHAPE, IsingConfig(update_every=10))
    first = int(ours.run.guide.curvature_updates)
    for _ in range(20):
        ours.amortised()
    assert int(ours.run.guide.curvature_updates) - first == 2


def test_both_networks_are_of_one_size() -> None:
    ours = ising_step(SHAPE).run
    count = sum(p.numel() for p in plain_network(SHAPE).parameters())
    assert count == ours.model.num_masked_weights + sum(p.numel() for p in ours.model.parameters())


def test_turns_are_shared_out_evenly() -> None:
    calls: list[str] = []
    cases = {name: lambda name=name: calls.append(name) for name in "abc"}
    taken = interleaved(cases, 6)
    assert {len(seconds) for seconds in taken.values()} == {6}
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]  # after two calls of each to warm up
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds) and {turn[0] for turn in rounds} == {"a", "b", "c"}


def test_a_case_that_takes_long_has_three_repeats_at_least() -> None:
    assert {len(s) for s in interleaved({"a": lambda: sum(range(1000))}, 50, limit_s=0.0).values()} == {3}


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_memory_of_draws_is_bounded_by_the_chunk(start: str, monkeypatch) -> None:
    """380 MB of activations at once, or a few: what a chunk holds is what is added. A CPU makes 256 of 24,000."""
    context = multiprocessing.get_context(start)  # a fork is not fresh, but its growth is its own
    monkeypatch.setattr("multiprocessing.get_context", lambda _: context)
    shape = replace(SHAPE, vit=replace(TINY, width=64, heads=4), side=48)
    small, large = (in_fresh_process(peak_of_draws, shape, chunk, 8, 600) for chunk in (4, 24_000))
    assert small["result_mb"] == large["result_mb"] == pytest.approx(8 * 600 * 3 * 4e-6)
    assert small["growth_mb"] < 0.25 * large["growth_mb"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--repeats", "0"], "repeats must be at least 1"),
        (["--depth", "0"], "depth must be at least 1"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_flags(tmp_path, capsys, flags, message) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is one")
    assert message in fails(benchmark, [*SHORT, "--out", str(tmp_path / "out"), *flags], capsys)


def test_nothing_is_replaced_unasked(folder, capsys) -> None:
    assert "--overwrite" in fails(benchmark, [*SHORT, "--out", str(folder)], capsys)


@pytest.mark.parametrize(("content", "message"), [(None, "there is no"), ("{", "cannot be read"), ("{}", "missing")])
def test_figures_of_what_is_no_benchmark(tmp_path, capsys, content, message) -> None:
    if content is not None:
        (tmp_path / "benchmark.json").write_text(content)
    assert message in fails(draw, ["--results", str(tmp_path)], capsys)


def test_the_published_tables_are_those_of_the_published_run() -> None:
    root = Path(__file__).parents[2]
    result = read(root / "analysis" / "results" / "benchmark")
    assert table(result) in (root / "docs" / "speed.md").read_text()
    assert f"{result['step_ratio_eager']:.2f} times" in (root / "README.md").read_text()

"""The further parts of the benchmark: variants, scaling curves, input, memory, peers."""

import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from inference.benchmark_cases import (
    Case,
    Shape,
    ising_draws,
    ising_step,
    plain_draws,
    plain_step,
    times,
)
from pyro_isingvit.core.errors import need
from pyro_isingvit.core.settings import IsingConfig, RunConfig
from pyro_isingvit.data.batches import batches
from pyro_isingvit.data.split import Split

Turns = Callable[[dict[str, Case], str], dict[str, list[float]]]
UPDATE = "update"


def medians(taken: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median seconds of every case."""
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def against_plain(plain: float, step: float, update: float, steps: int) -> dict[str, float]:
    """The ratio of our step, with an update every ``steps`` steps, to the plain one; and the update's share of ours."""
    ours = step + update / steps
    return {"step_ratio": ours / plain, "mask_update_share": update / steps / ours}


def variants(
    shape: Shape, granularities: Sequence[str], saliencies: Sequence[str], steps: int, turns: Turns
) -> list[dict[str, Any]]:
    """Step and mask update of each granularity and saliency against a plain step, amortised over ``steps``."""
    rows = []
    for granularity in granularities:
        cases: dict[str, Case] = {"plain": plain_step(shape)}
        for saliency in saliencies:
            ours = ising_step(shape, IsingConfig(granularity=granularity, saliency=saliency))  # type: ignore[arg-type]
            cases |= {f"{saliency} step": ours.step, f"{saliency} {UPDATE}": ours.update}
        taken = turns(cases, f"masks on {granularity}")
        for saliency in saliencies:
            own = {name: taken[name] for name in ("plain", f"{saliency} step", f"{saliency} {UPDATE}")}
            plain, step, update = medians(own).values()
            ratios = against_plain(plain, step, update, steps)
            rows.append({"granularity": granularity, "saliency": saliency, **ratios, "repeats_s": own})
    return rows


def curves(
    shape: Shape, values: Mapping[str, Sequence[int]], images: int, steps: int, turns: Turns
) -> dict[str, list[dict[str, Any]]]:
    """Ratio of our step to the plain one over width, depth and batch size, and of S draws to S forward passes."""
    result: dict[str, list[dict[str, Any]]] = {}
    for name in ("width", "depth", "batch"):
        rows = []
        for value in values[name]:
            change: dict[str, Any] = {name: value}
            here = replace(shape, **change) if name == "batch" else replace(shape, vit=replace(shape.vit, **change))
            ours = ising_step(here)
            taken = turns({"plain": plain_step(here), "ising": ours.step, UPDATE: ours.update}, f"{name} {value}")
            median = medians(taken)
            rows.append({
                name: value, "weights": ours.run.model.num_masked_weights, "repeats_s": taken,
                **against_plain(median["plain"], median["ising"], median[UPDATE], steps), "plain_s": median["plain"],
            })  # fmt: skip
        result[name] = rows
    result["draws"] = []
    for value in values["draws"]:
        cases = {"plain": plain_draws(shape, value, images), "ising": ising_draws(shape, value, images)}
        taken = turns(cases, f"{value} draws")
        median = medians(taken)
        result["draws"].append({
            "draws": value, "predictive_ratio": median["ising"] / median["plain"], "plain_s": median["plain"],
            "repeats_s": taken,
        })  # fmt: skip
    return result


def input_path(shape: Shape, turns: Turns) -> dict[str, Any]:
    """An epoch of steps on uint8 batches, as in training, against as many steps on one prepared batch."""
    ours, count = ising_step(shape), 10 * shape.batch
    split = Split(shape.images(count), torch.arange(count, device=shape.device) % shape.classes)

    def real() -> None:
        for images, *_ in batches(split, shape.batch, seed=0, epoch=0):
            shape.info.normalise(images)
            ours.amortised()

    taken = turns({"synthetic": times(ours.amortised, 10), "real": real}, "input")
    ratio = statistics.median(taken["real"]) / statistics.median(taken["synthetic"])
    return {"ratio": ratio, "repeats_s": taken}


# Memory ---------------------------------------------------------------------------------------------------------


def memory(shape: Shape, chunks: Sequence[int], draws: int, images: int) -> dict[str, Any]:
    """Peak memory of a training step and of posterior draws, each in a fresh process; MB = 10^6 bytes.

    ``growth_mb`` is what the work itself added to the process's peak. On a GPU both count only GPU memory.
    """
    rows: dict[str, Any] = {"draws": draws, "images": images}
    rows["plain_step"] = in_fresh_process(peak_of_step, shape, False)
    rows["ising_step"] = in_fresh_process(peak_of_step, shape, True)
    rows["predictive"] = [
        {"chunk": chunk, "samples": samples, **in_fresh_process(peak_of_draws, shape, chunk, samples, images)}
        for chunk in chunks
        for samples in (draws // 10, draws)
    ]
    return rows


def in_fresh_process[**P, T](function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Calls a function of this module in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def peak_of_step(shape: Shape, ours: bool) -> dict[str, float]:
    """Peak of ten training steps with a mask update."""
    torch.set_num_threads(1)
    before = _held(shape)
    case = ising_step(shape).amortised if ours else plain_step(shape)
    times(case, 10)()
    return _grown(shape, before)


def peak_of_draws(shape: Shape, chunk: int, draws: int, images: int) -> dict[str, float]:
    """Peak of S draws of the images; the probabilities themselves, (S, B, C) float32, are part of it."""
    torch.set_num_threads(1)
    case = ising_draws(shape, draws, images, chunk)
    before = _held(shape)
    case()
    return _grown(shape, before) | {"result_mb": 4e-6 * draws * images * shape.classes}


def _peak(shape: Shape) -> float:
    """The most memory held since the last call, MB; the count starts again here."""
    if shape.device == "cuda":
        most = torch.cuda.max_memory_allocated() / 1e6
        torch.cuda.reset_peak_memory_stats()
        return most
    need(Path("/proc/self/clear_refs").exists(), "peak memory is read from Linux's /proc; set `memory` to False.")
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high water mark
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def _held(shape: Shape) -> float:
    """The memory held now, MB; the peak counts from here."""
    _peak(shape)
    return _peak(shape)


def _grown(shape: Shape, before: float) -> dict[str, float]:
    peak = _peak(shape)
    return {"peak_mb": peak, "growth_mb": peak - before}


# Peers ----------------------------------------------------------------------------------------------------------

PEERS = ("tyxe", "tyxe-plain", "bayesian-torch")


def peer_config(device: str) -> RunConfig:
    """Preset small on the digits, 16 tokens, a few epochs.

    Raises:
        UserError: no peer is installed.
    """
    from inference.peers import PeersArguments, make_config

    chosen: Any = device
    return make_config(
        PeersArguments(Path("unused"), PEERS, preset="small", patch_size=2, epochs=4, samples=1, device=chosen)
    )


def peers(device: str) -> dict[str, Any]:
    """Epochs of other libraries on the digits and the same network, taking turns; their seconds divided by ours."""
    from inference.peers import ratio, run_methods

    rows = {row["peer"]: row for row in run_methods(["ising", "deterministic", *PEERS], peer_config(device))}
    seconds = {name: row.get("epoch_seconds") for name, row in rows.items()}
    ratios = {name: ratio(rows[name], rows["ising"]) for name in ("deterministic", *PEERS)}
    return {"epoch_ratio": ratios, "epoch_seconds": seconds}

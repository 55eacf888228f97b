"""Time a training step, a mask update and posterior draws against a plain ViT of the same size, in one run.

python -m inference.benchmark --device cpu --out runs/benchmark

Compared cases take turns. Read the ratios of medians; the seconds hold only for this machine and its load.
To draw the results: python -m analysis.benchmark --results runs/benchmark
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from inference.cli import print_table, results_file, run_script
from pyro_isingvit.core.errors import UserError, need
from pyro_isingvit.core.presets import preset
from pyro_isingvit.core.settings import IsingConfig, ViTConfig
from pyro_isingvit.methods.registry import METHODS, WITHOUT
from pyro_isingvit.version import __version__

RESULTS, PROFILE = "benchmark.json", "profile.txt"
GRANULARITIES = ("weight", "unit", "head", "block")
SALIENCIES = ("gnb", "lm", "hutchinson", "empirical_fisher")  # exact is for very small networks
CURVES: dict[str, tuple[int, ...]] = {
    "width": (64, 128, 256, 512, 768), "depth": (2, 4, 6, 8, 12), "batch": (16, 64, 128, 256, 512),
    "draws": (1, 10, 50, 200),
}  # fmt: skip
CHUNKS = (32, 64, 256)
MEMORY_DRAWS, MEMORY_IMAGES, CURVE_IMAGES = 1000, 512, 256


@dataclass(frozen=True)
class BenchmarkArguments:
    """What to time, and how long."""

    out: Path
    """Folder for benchmark.json."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run."""
    preset: Literal["digits", "small", "cifar-linear"] = "small"
    """Shape of the network; the plain one has mean pooling and a linear head."""
    depth: int | None = None
    """Number of blocks; by default the preset's."""
    batch_size: int = 64
    """Images of a training step."""
    draws: int = 100
    """Posterior predictive draws S."""
    images: int = 1000
    """Images that the draws predict."""
    repeats: int = 15
    """Repeats of each measurement; fewer, but at least 3, if they would take more than a minute."""
    threads: int = 2
    """Threads of PyTorch on the CPU."""
    compiled: bool = True
    """Also time the steps through torch.compile (a CPU needs a C++ compiler)."""
    bf16: bool = False
    """Run the forward passes of both in bfloat16."""
    variants: bool = True
    """Time every granularity and saliency."""
    curves: bool = True
    """Time other widths, depths, batch sizes and numbers of draws."""
    memory: bool = True
    """Measure peak memory, each in its own process."""
    peers: bool = False
    """Also time epochs of TyXe and bayesian-torch (extra: peers)."""
    profile: bool = False
    """Write PyTorch's profile of ten of our steps."""
    overwrite: bool = False
    """Replace the results that the folder holds."""


def benchmark(arguments: BenchmarkArguments) -> None:
    """Time training steps, mask updates and posterior draws against a plain ViT of the same size."""
    path = results_file(arguments.out, RESULTS, arguments.overwrite)
    for name in ("batch_size", "draws", "images", "repeats", "threads"):
        need(getattr(arguments, name) >= 1, f"{name} must be at least 1, not {getattr(arguments, name)}.")
    if arguments.peers:
        from inference.benchmark_parts import peer_config

        peer_config(arguments.device)  # raises where none is installed
    import torch

    from pyro_isingvit.core.checkpoint import write_json, write_text

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available here; use --device cpu.")
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        result = measure(arguments)
        if arguments.profile:
            write_text(arguments.out / PROFILE, profile(arguments))
    finally:
        torch.set_num_threads(before)
    write_json(path, result)
    print_result(result)
    print(f"results: {path}\nfigures: python -m analysis.benchmark --results {arguments.out}")


def measure(arguments: BenchmarkArguments) -> dict[str, Any]:
    """Everything that benchmark.json holds."""
    from inference.benchmark_cases import ising_draws, ising_step, plain_draws, plain_step, times
    from inference.benchmark_parts import curves, input_path, medians, memory, peers, variants
    from pyro_isingvit.pruning.cost import interleaved

    found, shape = machine(arguments.threads, arguments.device), shape_of(arguments)
    steps = IsingConfig().update_every

    def turns(cases: dict, label: str) -> dict[str, list[float]]:
        return interleaved(cases, arguments.repeats, label=label)

    usual = METHODS["ising"].train
    ours, pyro = ising_step(shape), ising_step(shape, settings=replace(usual, engine="pyro"))
    bare = ising_step(shape, settings=replace(usual, **WITHOUT))
    repeats = turns(
        {"plain_step": times(plain_step(shape), steps), "ising_step": times(ours.amortised, steps),
         "ising_step_alone": times(ours.step, steps), "mask_update": ours.update,
         "ising_step_unregularised": times(bare.amortised, steps),
         "pyro_engine_step": times(pyro.amortised, steps)}, "eager steps",
    )  # fmt: skip
    if arguments.compiled:
        quick = replace(shape, compiled=True)
        cases = {"plain_step_compiled": plain_step(quick), "ising_step_compiled": ising_step(quick).amortised}
        repeats |= turns({name: times(case, steps) for name, case in cases.items()}, "compiled steps")
    repeats = {name: [s / (1 if name == "mask_update" else steps) for s in taken] for name, taken in repeats.items()}
    wanted = arguments.draws, arguments.images
    repeats |= turns({"plain_draws": plain_draws(shape, *wanted), "ising_draws": ising_draws(shape, *wanted)}, "draws")
    median = medians(repeats)
    result: dict[str, Any] = {
        "step_ratio_eager": median["ising_step"] / median["plain_step"],
        "step_ratio_compiled": median["ising_step_compiled"] / median["plain_step_compiled"]
        if arguments.compiled else None,
        "step_ratio_unregularised": median["ising_step_unregularised"] / median["plain_step"],
        "step_ratio_pyro_engine": median["pyro_engine_step"] / median["plain_step"],
        "predictive_ratio": median["ising_draws"] / median["plain_draws"],
        "mask_update_share": median["mask_update"] / steps / median["ising_step"],
        "peak_memory_mb": None,
        "median_s": median, "repeats_s": repeats, "machine": found,
        "settings": {**{k: v for k, v in asdict(arguments).items() if k != "out"}, "vit": asdict(shape.vit)},
        "weights": ours.run.model.num_masked_weights, "version": __version__,
    }  # fmt: skip
    result["input"] = input_path(shape, turns)
    if arguments.memory:
        result["memory"] = memory(shape, CHUNKS, MEMORY_DRAWS, MEMORY_IMAGES)
        result["peak_memory_mb"] = result["memory"]["ising_step"]["peak_mb"]
    if arguments.variants:
        result["variants"] = variants(shape, GRANULARITIES, SALIENCIES, steps, turns)
    if arguments.curves:
        result["curves"] = curves(shape, CURVES, CURVE_IMAGES, steps, turns)
    if arguments.peers:
        result["peers"] = peers(arguments.device)
    return result


def shape_of(arguments: BenchmarkArguments) -> Any:
    """The network and its images, as a ``Shape``."""
    from inference.benchmark_cases import Shape

    vit = preset(arguments.preset, depth=arguments.depth)
    return Shape(vit, arguments.batch_size, device=arguments.device, bf16=arguments.bf16, **_images_of(vit))


def _images_of(vit: ViTConfig) -> dict[str, Any]:
    """Images of the usual size for a patch: 8 pixels for 2, 28 for 7, otherwise 32 in colour."""
    return {2: {"side": 8, "channels": 1}, 7: {"side": 28, "channels": 1}}.get(
        vit.patch_size, {"side": 32, "channels": 3}
    )  # fmt: skip


def machine(threads: int, device: str) -> dict[str, Any]:
    """The conditions of the measurement: processor, threads, PyTorch, and the load at the start."""
    import os
    import platform

    import torch

    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return {
        "processor": name, "cores": os.cpu_count(), "threads": threads, "torch": torch.__version__,
        "python": platform.python_version(), "load_average_at_start": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }  # fmt: skip


def profile(arguments: BenchmarkArguments) -> str:
    """PyTorch's table of ten of our steps, mask update included."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    from inference.benchmark_cases import ising_step, times

    case = times(ising_step(shape_of(arguments)).amortised, 10)
    case()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if arguments.device == "cuda" else [])]
    with torch_profile(activities=kinds, record_shapes=True, acc_events=True) as record:
        case()
    order = "self_cuda_time_total" if arguments.device == "cuda" else "self_cpu_time_total"
    return record.key_averages().table(sort_by=order, row_limit=40)


def print_result(result: dict[str, Any]) -> None:
    """The closing table."""
    settings, median = result["settings"], result["median_s"]
    rows: dict[str, object] = {
        "step, plain (ms)": 1e3 * median["plain_step"],
        "step, ours with mask updates (ms)": 1e3 * median["ising_step"],
        "ratio, eager": result["step_ratio_eager"],
        "ratio without the default regulariser": result["step_ratio_unregularised"],
        "ratio, torch.compile": "not measured" if result["step_ratio_compiled"] is None
        else result["step_ratio_compiled"],
        "ratio, Pyro's path (--engine pyro)": result["step_ratio_pyro_engine"],
        "mask update, share of a step": result["mask_update_share"],
        f"{settings['draws']} draws of {settings['images']} images, ratio": result["predictive_ratio"],
        "input: epoch on real batches / on one fixed batch": result["input"]["ratio"],
    }  # fmt: skip
    if result["peak_memory_mb"] is not None:
        rows["peak memory of training (MB)"] = result["peak_memory_mb"]
    for name, share in result.get("peers", {}).get("epoch_ratio", {}).items():
        rows[f"epoch of {name} / ours"] = "not installed" if share is None else share
    title = f"{settings['preset']}, batch {settings['batch_size']}, {result['machine']['processor']}, "
    print_table(f"{title}{settings['threads']} threads", rows)


def main(argv: list[str] | None = None) -> None:
    """Parses the command line."""
    run_script(benchmark, BenchmarkArguments, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()

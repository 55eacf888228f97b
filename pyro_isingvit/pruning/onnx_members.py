"""One ONNX graph of K networks drawn from the posterior: a prediction and its uncertainty in one pass, without Python.

    p_k = softmax(f_{W_k}(x) / T),  W_k ~ q,  k = 1..K         drawn once, by a seed, and kept
    probabilities = (1/K) sum_k p_k,    entropy H(probabilities),    mutual information H - (1/K) sum_k H(p_k)
    lower, upper = 5% and 95% quantiles over k of each class's p_k, linear between the two nearest draws

The same as ``PredictiveDraws(bayes.predict(images, K, seed))``. Matrices that are drawn are stacked, (K, in, out), and
multiplied at once; whatever lies below the first of them, and all that has no posterior, is there once.

Shapes: K members, B batch, T tokens, C classes.
"""

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from pyro_isingvit.core.errors import need, need_whole
from pyro_isingvit.predictive.draws import PredictiveDraws
from pyro_isingvit.pruning.export import write_onnx
from pyro_isingvit.pruning.network import CompactViT

MEMBERS = "members.onnx"
OUTPUTS = ("probabilities", "lower", "upper", "entropy", "mutual_information")
INTERVAL = 0.9  # share of the draws between lower and upper
MOST = 500  # members: the error of a mean falls with the root of K, size and time grow with K
LARGEST = 2**31  # bytes of an ONNX file
TOLERANCE = 1e-5


def check_members(members: int) -> None:
    """Raises UserError where no file can have so many members."""
    need_whole(0, members=members)
    need(
        1 <= members <= MOST,
        f"`members` must lie between 1 and {MOST}, not {members}: size and time grow with it, and 20 to 50 are usual.",
    )


class _Stacked(nn.Module):
    """The linear layer of all members. Images of different members stand one after the other: (K B, ..., in)."""

    def __init__(self, weight: Tensor, bias: Tensor, first: bool) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight.transpose(1, 2).contiguous())  # (K, in, out)
        self.register_buffer("bias", bias[:, None])  # (K, 1, out)
        self.first = first  # reads (B, ..., in), the same for all members

    def forward(self, x: Tensor) -> Tensor:
        """(K B, ..., in), or (B, ..., in) where it is the first, to (K B, ..., out)."""
        members, inputs, outputs = self.weight.shape
        rows = x.flatten(0, -2) if self.first else x.reshape(members, -1, inputs)
        return (torch.matmul(rows, self.weight) + self.bias).reshape(-1, *x.shape[1:-1], outputs)


class _Repeated(nn.Module):
    """A block that gets the same tokens for all members, (B, T, D), and gives each its own, (K B, T, D)."""

    def __init__(self, block: nn.Module, members: int) -> None:
        super().__init__()
        self.block, self.members = block, members

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.repeat(self.members, 1, 1))


class Members(nn.Module):
    """K drawn networks as one module; normalised images (B, channels, height, width) to the tensors of ``OUTPUTS``.

    Args:
        model: a compact network of the form ``bayes``.
        members: K.
        seed: of the draws, as in ``CompactViT.predict``.

    Raises:
        UserError: K out of range, the form ``mean``, or more numbers than an ONNX file can hold.
    """

    @torch.no_grad()
    def __init__(self, model: CompactViT, members: int, seed: int = 0) -> None:
        super().__init__()
        check_members(members)
        noise = torch.Generator(device=model.position.device).manual_seed(seed)
        drawn = [model.draw(noise)]
        size = 4 * members * sum(value.numel() for value in drawn[0].values())
        need(size < LARGEST, f"{members} members need {size / 2**30:.1f} GiB, and an ONNX file holds less than 2; "
             "choose fewer `members`, or cut further.")  # fmt: skip
        drawn += [model.draw(noise) for _ in range(members - 1)]
        self.members = members
        self.network = copy.deepcopy(model).cpu().eval()
        self.network.posteriors = nn.ModuleDict()
        paths = [name.replace("__", ".") for name in model.posteriors]
        blocks = sorted({int(path.split(".")[1]) for path in paths if path.startswith("blocks.")})
        shared = "patch" not in paths  # what lies below the first drawn matrix is computed once
        for path in paths:
            weight = torch.stack([draw[f"{path}.weight"] for draw in drawn])
            biases = [draw.get(f"{path}.bias", weight.new_zeros(weight.shape[1])) for draw in drawn]
            first = path == "patch" or (shared and not blocks and path == _top(paths))
            parent, _, name = path.rpartition(".")
            setattr(self.network.get_submodule(parent), name, _Stacked(weight, torch.stack(biases), first).cpu())
        if shared and blocks:
            self.network.blocks[blocks[0]] = _Repeated(self.network.blocks[blocks[0]], members)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Probabilities, their lower and upper ends, (B, C) each; entropy and mutual information, (B,) each, nats."""
        logits = self.network(x)
        probs = logits.reshape(self.members, -1, logits.shape[-1]).softmax(-1)  # (K, B, C)
        mean = probs.mean(0)
        total, each = _entropy(mean), _entropy(probs)
        lower, upper = (self._end(probs, largest) for largest in (False, True))
        return mean, lower, upper, total, (total - each.mean(0)).clamp(min=0.0)

    def _end(self, probs: Tensor, largest: bool) -> Tensor:
        """The quantile at one end of the interval, numpy's ``linear``."""
        place = (1 - INTERVAL) / 2 * (self.members - 1)  # counted from that end
        below, above = int(place), min(int(place) + 1, self.members - 1)
        ends = probs.topk(above + 1, dim=0, largest=largest).values
        return torch.lerp(ends[below], ends[above], place - below)


def _entropy(probs: Tensor) -> Tensor:
    """-sum_c p_c log p_c, nats; 0 log 0 = 0. ONNX has no ``entr``."""
    return -(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1)


def _top(paths: list[str]) -> str:
    """The first of the drawn matrices above the blocks."""
    return "head_hidden" if "head_hidden" in paths else "head"


def export_members(model: CompactViT, path: str | Path, members: int = 20, seed: int = 0) -> float:
    """Writes one ONNX file of K networks of the posterior, and checks it with onnxruntime.

    Its outputs: ``probabilities``, ``lower``, ``upper`` (B, C), ``entropy`` and ``mutual_information`` (B,), nats;
    ``predict_onnx`` runs it.

    Args:
        model: a compact network of the form ``bayes``.
        path: the file.
        members: K; 20 to 50 are usual.
        seed: of the draws: the file predicts what ``model.predict(images, samples=members, seed=seed)`` says.

    Returns:
        the largest difference between file and ``PredictiveDraws`` seen, over batches of 1, 3 and 7 random images.

    Raises:
        UserError: packages are missing, the form is ``mean``, K is below 1 or above 500, the file cannot be written or
            would be larger than 2 GiB, or its outputs differ by more than 1e-5; nothing is written then.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from pyro_isingvit import ViTConfig, compact, export_members, fit, load_data, predict_onnx
        >>> data = load_data("digits", train_size=100)
        >>> vit = ViTConfig(patch_size=4, width=16, heads=4, depth=1)
        >>> run = fit(vit, data, epochs=3, granularity="unit", progress=False)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     file = Path(place) / "members.onnx"
        ...     difference = export_members(compact(run, "bayes"), file, members=4)
        ...     found = predict_onnx(file, data.test.images[:3])
        >>> found.probs.shape, found.mutual_information.shape
        (torch.Size([3, 10]), torch.Size([3]))
        >>> bool((found.lower <= found.upper).all())
        True
    """
    module = Members(model, members, seed)
    noise = torch.Generator(device=model.position.device).manual_seed(seed)
    drawn = [model.draw(noise) for _ in range(members)]

    def expected(x: Tensor) -> list[Tensor]:
        device = model.position.device
        logits = [torch.func.functional_call(model, weights, (x.to(device),)) for weights in drawn]
        draws = PredictiveDraws(torch.stack(logits).softmax(-1).cpu())
        return [draws.mean, *draws.interval(INTERVAL), draws.entropy, draws.mutual_information]

    described = {"members": members, "seed": seed, "interval": INTERVAL, "temperature": float(model.temperature)}
    return write_onnx(module, model.config, Path(path), OUTPUTS, described, expected, TOLERANCE)

"""The network that pruning leaves: an ordinary ``torch.nn.Module`` with layers of differing sizes, without Pyro.

Two forms share one architecture. ``mean`` is one deterministic network. ``bayes`` adds, to each matrix, the posterior
scales s and the retention probabilities pi of the masks that were kept, so that networks can be drawn:

    w_e = xi_e (m_e + s_e eps),   xi ~ Bernoulli(pi),   eps ~ N(0, 1)

Masks that were cut are off in every draw, and a mask that is drawn off gives exactly 0: the spike N(0, tau_0^2) of
the full posterior is set to 0.

Shapes: B batch, T tokens, D width, H heads, C classes, S samples.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from pyro_isingvit.core.checkpoint import write_atomically, write_text
from pyro_isingvit.core.errors import UserError, need, need_whole, why
from pyro_isingvit.core.precision import single_precision
from pyro_isingvit.core.random_state import checked_seed
from pyro_isingvit.data.images import Images, as_images, network_chunk
from pyro_isingvit.nets.shape import ACTIVATIONS, patch_grid
from pyro_isingvit.nets.stem import ConvStem
from pyro_isingvit.pruning.card import FILES, METRICS, WEIGHTS, write_compact_card
from pyro_isingvit.pruning.posterior import Posterior
from pyro_isingvit.pruning.shapes import CONFIG, FORMAT, CompactConfig, LayerShape
from pyro_isingvit.runs.folder import holds_run
from pyro_isingvit.sharing.card import check_license
from pyro_isingvit.sharing.folder import temporary_folder
from pyro_isingvit.sharing.hub import check_repo, locate, upload
from pyro_isingvit.sharing.names import shared_name


class Attention(nn.Module):
    """Self-attention over the heads and channels that are left.

    Args:
        width: D.
        shape: of the layer.
        head_dim: channels of a head before pruning.
    """

    def __init__(self, width: int, shape: LayerShape, head_dim: int) -> None:
        super().__init__()
        self.shape, self.scale = shape, head_dim**-0.5
        heads, q, v = shape.heads, shape.query, shape.value
        if heads:
            self.qkv = nn.Linear(width, heads * (2 * q + v))
            self.out = nn.Linear(heads * v, width)
        if shape.uniform:
            self.uniform_value = nn.Linear(width, shape.uniform)
            self.uniform_out = nn.Linear(shape.uniform, width, bias=not heads)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D), or (B, 1, D) where every head left is uniform."""
        shape = self.shape
        if not shape.heads:
            return self._uniform(x)
        parts = self.qkv(x).split([shape.heads * n for n in (shape.query, shape.query, shape.value)], dim=-1)
        q, k, v = (part.unflatten(-1, (shape.heads, -1)).transpose(1, 2) for part in parts)  # (B, H, T, channels)
        gap = shape.query - shape.value
        if gap:  # the fused kernel wants q, k and v of one size
            q, k, v = (F.pad(q, (0, -gap)), F.pad(k, (0, -gap)), v) if gap < 0 else (q, k, F.pad(v, (0, gap)))
        heads = F.scaled_dot_product_attention(q, k, v, scale=self.scale)[..., : shape.value]
        attended = self.out(heads.transpose(1, 2).flatten(2))
        return attended + self._uniform(x) if shape.uniform else attended

    def _uniform(self, x: Tensor) -> Tensor:
        """A mean over the tokens passes through linear maps: one product an image, not one a token; (B, 1, D)."""
        return self.uniform_out(self.uniform_value(x.mean(1, keepdim=True)))


class Block(nn.Module):
    """A pre-norm block. An empty branch is left out; its constant was added to the branch before it."""

    def __init__(self, config: CompactConfig, shape: LayerShape) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.activate = ACTIVATIONS[config.activation]
        self.has_attention, self.has_mlp = bool(shape.heads or shape.uniform), bool(shape.hidden)
        if self.has_attention:
            self.attention_norm = nn.LayerNorm(width, eps)
            self.attention = Attention(width, shape, config.head_dim)
        if self.has_mlp:
            self.mlp_norm = nn.LayerNorm(width, eps)
            self.fc1 = nn.Linear(width, shape.hidden)
            self.fc2 = nn.Linear(shape.hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        return self.feed(self.attend(x))

    def attend(self, x: Tensor) -> Tensor:
        """The first branch, attention."""
        return x + self.attention(self.attention_norm(x)) if self.has_attention else x

    def feed(self, x: Tensor) -> Tensor:
        """The second branch, the MLP."""
        return x + self.fc2(self.activate(self.fc1(self.mlp_norm(x)))) if self.has_mlp else x


class CompactViT(nn.Module):
    """A pruned vision transformer, as ``compact`` makes it and ``from_pretrained`` loads it.

    Args:
        config: shapes and what the images look like.

    Attributes:
        temperature: T of the predictions; the logits are divided by it.

    Examples:
        >>> import tempfile
        >>> from pyro_isingvit import CompactViT, ViTConfig, compact, fit, load_data
        >>> data = load_data("digits", train_size=100)
        >>> vit = ViTConfig(patch_size=4, width=16, heads=4, depth=1)
        >>> small = compact(fit(vit, data, epochs=3, granularity="unit", progress=False))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     small.save_pretrained(place)
        ...     again = CompactViT.from_pretrained(place)
        >>> images = data.test.images[:3]
        >>> again(again.normalise(images)).shape
        torch.Size([3, 10])
        >>> bool((again.predict(images) == small.predict(images)).all())
        True
    """

    @single_precision()
    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        channels, height, width = config.image_shape
        size = config.patch_size
        self.grid, self.padding = patch_grid(height, width, size, config.stride)
        tokens = self.grid[0] * self.grid[1] + config.prefix
        self.stem = ConvStem(channels, size, config.width) if config.stem == "conv" else None
        self.patch = nn.Linear(channels * size * size if self.stem is None else self.stem.out, config.width)
        self.position = nn.Parameter(torch.zeros(tokens, config.width))
        if config.pool == "cls":
            self.cls = nn.Parameter(torch.zeros(config.width))
        if config.registers:
            self.register_tokens = nn.Parameter(torch.zeros(config.registers, config.width))
        if config.norm_pre:
            self.norm_pre = nn.LayerNorm(config.width, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config, shape) for shape in config.layers)
        self.norm = nn.LayerNorm(config.width, config.norm_eps)
        self.features: Tensor | None
        chosen = torch.arange(config.features) if config.features < config.width else None
        self.register_buffer("features", chosen)
        top = config.features
        if config.head_hidden is not None:
            self.head_hidden, top = nn.Linear(top, config.head_hidden), config.head_hidden
        self.head = nn.Linear(top, len(config.classes))
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))
        for name, shape in config.sites.items():
            self.register_buffer(f"retention_{name}", torch.zeros(shape))
        self.posteriors = nn.ModuleDict(
            {
                name.replace(".", "__"): Posterior(kept, self.get_parameter(f"{name}.weight").shape[0])
                for name, kept in config.posteriors.items()
            }
        )

    def normalise(self, images: Tensor) -> Tensor:
        """(scaled - mean) / std, (B, channels, height, width) to float32; scaled = images / 255 for 8 bits.

        Raises:
            UserError: another shape or type, or values that are no pixels of the training images' kind.
        """
        wanted, scale = self.config.image_shape, self.config.scale
        need(
            tuple(images.shape[1:]) == wanted and images.dtype == scale.dtype,
            f"images of shape {tuple(images.shape)} {images.dtype} given, the network reads (B, "
            f"{', '.join(map(str, wanted))}) {scale.dtype}.",
        )
        scale.check(images, f"the network reads {scale.kind}")
        return scale.standardised(scale.scaled(images))

    def forward(self, x: Tensor) -> Tensor:
        """Logits over T (C of them) of normalised images; the form ``bayes`` uses the means m of its weights.

        Args:
            x: (B, channels, height, width) float, as ``normalise`` gives them.

        Returns:
            (B, C).
        """
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.classify(x) / self.temperature

    def embed(self, x: Tensor) -> Tensor:
        """Normalised images (B, channels, height, width) to the tokens (B, T, D) that the first block reads."""
        config = self.config
        x = self.patch(self._patches(F.pad(x, self.padding) if any(self.padding) else x))  # (B, T, D)
        if config.registers:
            x = torch.cat([self.register_tokens.expand(x.shape[0], -1, -1), x], dim=1)
        if config.pool == "cls":
            x = torch.cat([self.cls.expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.position
        return self.norm_pre(x) if config.norm_pre else x

    def classify(self, x: Tensor) -> Tensor:
        """The tokens (B, T, D) that the last block gives to logits (B, C), not divided by the temperature."""
        config = self.config
        x = x if config.final_norm == "pooled" else self.norm(x)
        x = x[:, 0] if config.pool == "cls" else x[:, config.registers :].mean(1)
        x = self.norm(x) if config.final_norm == "pooled" else x
        x = x if self.features is None else x.index_select(-1, self.features)
        if config.head_hidden is not None:
            x = F.relu(self.head_hidden(x))
        return self.head(x)

    def _patches(self, x: Tensor) -> Tensor:
        """(B, channels, height, width), padded, to (B, patches, numbers of a patch)."""
        size, stride, (rows, columns) = self.config.patch_size, self.config.stride, self.grid
        if self.stem is not None:
            return self.stem(x).flatten(2).transpose(1, 2)
        if stride != size:
            return F.unfold(x, size, stride=stride).transpose(1, 2)
        x = x.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # (B, channels, rows, size, columns, size)
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def draw(self, noise: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw of all matrices and biases, by parameter name, for ``torch.func.functional_call``.

        Raises:
            UserError: the form is ``mean``.
        """
        need(self.config.form == "bayes", "this compact network is of the form 'mean'; only 'bayes' can be sampled.")
        masks = {name: torch.bernoulli(self.get_buffer(f"retention_{name}"), generator=noise)
                 for name in self.config.sites}  # fmt: skip
        drawn = {}
        for name, posterior in self.posteriors.items():
            path = name.replace("__", ".")
            linear = self.get_submodule(path)
            assert isinstance(linear, nn.Linear) and isinstance(posterior, Posterior)
            drawn[f"{path}.weight"], more = posterior.draw(linear.weight, masks, noise)
            if linear.bias is not None:
                drawn[f"{path}.bias"] = linear.bias + more
        return drawn

    @torch.no_grad()
    def predict(
        self, images: Images | Tensor | np.ndarray, samples: int = 50, seed: int = 0, chunk: int = 2048
    ) -> Tensor:
        """Class probabilities of images.

        Args:
            images: (B, channels, height, width) of the training images' type: ``Images``, a tensor or an array.
            samples: S, networks drawn; the form ``mean`` is one network, S = 1.
            seed: of the draws.
            chunk: at most this many images pass at a time, and at most 256 on a CPU, fewer where the network is wide.

        Returns:
            (S, B, C).

        Raises:
            UserError: images that do not fit, or samples or chunk below 1.
        """
        need_whole(1, samples=samples, chunk=chunk)
        most = max(matrix.out_features for matrix in self.modules() if isinstance(matrix, nn.Linear))
        bayes, images = self.config.form == "bayes", as_images(images)
        few = len(images) <= min(chunk, images.chunk)
        chunk = network_chunk(min(chunk, images.chunk), self.position.device, len(self.position) * most)
        noise = torch.Generator(device=self.position.device).manual_seed(checked_seed(seed))
        result = torch.empty(samples if bayes else 1, len(images), len(self.config.classes), dtype=self.position.dtype)
        # Few images are normalised once, many anew for every draw.
        ready = list(images.batches(chunk, self.normalise, self.position.device)) if few else None
        for s in range(len(result)):
            drawn = self.draw(noise) if bayes else {}
            for i, x in enumerate(ready or images.batches(chunk, self.normalise, self.position.device)):
                result[s, i * chunk : (i + 1) * chunk] = functional_call(self, drawn, (x,)).softmax(-1).cpu()
        return result

    @torch.no_grad()
    def _from_earlier(self) -> None:
        """Makes what format 1 kept into what today's keeps: ``fold_loc`` was the mean, and the biases lacked it."""
        if self.config.format == 1:
            for name, posterior in self.posteriors.items():
                linear = self.get_submodule(name.replace("__", "."))
                assert isinstance(linear, nn.Linear) and isinstance(posterior, Posterior)
                if linear.bias is not None:
                    linear.bias.add_(posterior.fold_loc)
                if not posterior.by_row:
                    posterior.fold_loc.zero_()
            self.config = replace(self.config, format=FORMAT)

    def _check_indices(self) -> None:
        """Raises where a number that is looked up lies beyond what it is looked up in."""
        looked_up = [(self.features, self.config.width)]
        for posterior in self.posteriors.values():
            assert isinstance(posterior, Posterior)
            looked_up.append((posterior.index, len(self.get_buffer(f"retention_{posterior.site}").flatten())))
        for index, size in looked_up:
            need(index is None or not len(index.flatten()) or 0 <= int(index.min()) <= int(index.max()) < size,
                 "an index lies beyond its array")  # fmt: skip

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        metrics: Mapping[str, Any] | None = None,
        license: str | None = None,
        intended_use: str | None = None,
        repo: str | None = None,
    ) -> None:
        """Writes ``compact.json``, ``compact.safetensors`` and a model card, each whole or not at all.

        None of them names a folder of this machine (docs/sharing.md).

        Args:
            folder: made if it is not there. A README.md of somebody else in it stays as it is.
            metrics: of the test part, for the card, as pruning writes them to metrics.json.
            license: identifier for the card, such as "mit".
            intended_use: for the card, in your words.
            repo: "owner/name" for the card, where it will be found.

        Raises:
            UserError: the folder holds a run, or cannot be written to; no such licence or name.
        """
        from safetensors.torch import save

        folder = Path(folder)
        check_license(license)
        if repo is not None:
            check_repo(repo)
        need(not holds_run(folder), f"{folder} holds a run; name another folder for the compact network.")
        if metrics is None and (folder / CONFIG).exists():  # those of an earlier network
            (folder / METRICS).unlink(missing_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        content = save(state, {"format": "pt"})  # in memory first: safetensors has errors of its own for a full disk
        write_atomically(folder / WEIGHTS, lambda path: path.write_bytes(content))
        config = replace(self.config, dataset=shared_name(self.config.dataset))
        write_text(folder / CONFIG, config.to_json())
        count = sum(x.numel() for x in self.parameters())
        write_compact_card(folder, config, count, len(content), metrics, license, intended_use, repo)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        **card: Any,
    ) -> str:
        """Sends what ``save_pretrained`` writes to a repository of the Hugging Face Hub (extra ``hub``).

        Args:
            repo: "owner/name"; made if it is not there.
            private: of a new repository.
            token: of the Hub, with the right to write; None: the one that ``hf auth login`` keeps.
            commit_message: of the commit.
            **card: ``metrics``, ``license`` and ``intended_use`` of ``save_pretrained``.

        Returns:
            the address of the commit.

        Raises:
            UserError: a wrong name, huggingface_hub is missing, or the Hub refuses.
        """
        check_repo(repo)
        with temporary_folder() as place:
            self.save_pretrained(place, repo=repo, **card)
            return upload(place, repo, FILES, private=private, token=token, commit_message=commit_message)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **hub: Any) -> "CompactViT":
        """Loads what ``save_pretrained`` wrote or ``push_to_hub`` sent, in evaluation mode on the CPU.

        Args:
            folder: a folder, or "owner/name" of a repository; a folder wins, and a ``Path`` is always one.
            **hub: ``revision``, ``token``, ``cache_dir`` and ``local_files_only``, as ``TrainedRun.from_pretrained``.

        Raises:
            UserError: nothing there, or files that are damaged or do not fit each other.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        folder = locate(folder, FILES, **hub)
        for name in (CONFIG, WEIGHTS):
            need(
                (folder / name).is_file(),
                f"{folder} holds no compact network: {name} is missing; prune a run into it.",
            )
        config = CompactConfig.from_json((folder / CONFIG).read_text(errors="replace"), folder / CONFIG)
        try:
            state = load((folder / WEIGHTS).read_bytes())
            with torch.device("meta"):  # shapes alone: a small JSON file must not fill the memory
                model = cls(config)
            for name, wanted in model.state_dict().items():
                same = name in state and (state[name].dtype, state[name].shape) == (wanted.dtype, wanted.shape)
                need(same, f"{name} is missing or of another shape or type")
                need(not wanted.is_floating_point() or bool(state[name].isfinite().all()), f"{name} is not finite")
            model.load_state_dict(state, assign=True)
            model._check_indices()
            model._from_earlier()
        except (SafetensorError, RuntimeError, TypeError, AttributeError, ValueError, KeyError, IndexError) as error:
            text = f"{folder / WEIGHTS} is damaged or does not fit {CONFIG} ({why(error)[:160]}); prune the run again."
            raise UserError(text) from error
        return model.eval()

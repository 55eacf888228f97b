"""Pretraining on images without labels: the loop, what it keeps on disk, and how it goes on.

A folder has pretrain.json (settings and images), metrics.jsonl (a line per epoch), checkpoint.pt, the one before it,
and in the end start.safetensors, from which a training may start.
"""

import dataclasses
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from pyro_isingvit.core.checkpoint import load_checkpoint, save_checkpoint, write_text
from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.fields import check_fields
from pyro_isingvit.core.pretraining import PretrainConfig
from pyro_isingvit.core.random_state import seed_devices
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.core.train_settings import TrainConfig
from pyro_isingvit.data.augment import Augmentation
from pyro_isingvit.data.batches import batches, count_steps
from pyro_isingvit.data.decode import Pages
from pyro_isingvit.data.images import Images, Resize
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.split import UNLABELLED, Split
from pyro_isingvit.methods.rates import matrix_groups
from pyro_isingvit.nets.masked import MaskedImages
from pyro_isingvit.nets.start import Start
from pyro_isingvit.nets.vit import ViT
from pyro_isingvit.runs.folder import to_lines
from pyro_isingvit.runs.optimiser import learning_rate_factor
from pyro_isingvit.runs.steps import make_fabric

log = logging.getLogger(__name__)
SETTINGS, CHECKPOINT, HISTORY, START = "pretrain.json", "checkpoint.pt", "metrics.jsonl", "start.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class PretrainSettings:
    """Everything that makes a pretraining, saved with it."""

    source: str
    """Where the images are from, as given."""
    data_root: str
    image_size: int | None
    vit: ViTConfig
    train: PretrainConfig
    format: int = FORMAT
    resize: Resize = "fit"
    pages: Pages = "first"
    cache: str | None = None
    intensity: str = "full"
    test: bool = False
    """Whether a folder's own folder ``test`` is among the images."""
    groups: str | None = None
    columns: str = ""

    def check(self) -> None:
        """Raises UserError where a setting is of another kind or out of its range."""
        check_fields(self)
        self.train.check()

    def to_json(self) -> str:
        """The settings as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> "PretrainSettings":
        """The settings of a folder.

        Raises:
            UserError: there are none, or they are damaged.
        """
        path = folder / SETTINGS
        need(path.is_file(), f"{folder} holds no pretraining: {SETTINGS} is missing.")
        try:
            raw = json.loads(path.read_text(errors="replace"))
            need(raw["format"] == FORMAT, f"{path} is of format {raw['format']}, this version reads {FORMAT}.")
            raw["vit"], raw["train"] = ViTConfig(**raw["vit"]), PretrainConfig(**raw["train"])
            raw = {"resize": "stretch", "test": True} | raw  # before versions 0.7 and 0.12
            settings = cls(**raw)
            settings.check()
            return settings
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({why(error)}); pretrain again.") from error


class Pretraining:
    """One pretraining, kept in a folder or in memory.

    Args:
        settings: all of them.
        images: (N, C, H, W) uint8, without labels.
        folder: where to keep it; None: nowhere.
        progress: show a progress bar.

    Attributes:
        network: encoder and decoder.
        history: a dictionary per epoch.
        epoch: epochs that are finished.

    Raises:
        UserError: settings out of their range, or too few images.
    """

    def __init__(self, settings: PretrainSettings, images: Images, folder: Path | None, progress: bool = True) -> None:
        train = settings.train
        settings.check()
        self.settings, self.train, self.folder, self.progress = settings, train, folder, progress
        held = round(train.val_fraction * len(images))
        need(len(images) - held >= 2, f"{len(images)} images are too few to pretrain on.")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(train.seed)).numpy()
        part = Split(images, torch.full((len(images),), UNLABELLED))
        self.fabric = make_fabric(train.device, train.precision, devices=1)
        self.split, self.held = part.take(order[held:]), part.take(order[:held])
        self.info = DataInfo.of(settings.source, ("no", "labels"), self.split.images, settings.intensity)
        views = TrainConfig(augment=train.augment, margin=train.margin)
        self.views = Augmentation(views, self.info)
        seed_devices(train.seed, self.fabric.device)
        vit = ViT(settings.vit, *images.shape[1:], classes=2)
        self.network = MaskedImages(vit, train.masked, train.decoder_width, train.decoder_depth)
        self.steps = count_steps(len(self.split), train.batch_size)
        self.model, self.optimizer = self.fabric.setup(self.network, self._optimizer())
        total = self.steps * train.epochs
        warmup = int(train.warmup_fraction * total)
        self.scheduler = LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, total, total, warmup, 1.0)
        )  # fmt: skip
        device = self.fabric.device
        self.split, self.held = self.split.to(device), self.held.to(device)
        self.epoch, self.seconds, self.history = 0, 0.0, list[dict[str, Any]]()

    def _optimizer(self) -> torch.optim.Optimizer:
        train, network = self.train, self.network
        rates = TrainConfig(lr=train.lr, weight_decay=train.weight_decay)
        groups = matrix_groups(network.weights, network.vit.readers, rates)
        own = {id(p) for group in groups for p in group["params"]}
        others = [p for p in network.parameters() if id(p) not in own]
        groups.append({"params": others, "weight_decay": 0.0})
        for group in groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=train.lr, betas=(0.9, 0.95), fused=True)

    def run(self) -> Start:
        """Trains from the current epoch to the last, and keeps the start.

        Raises:
            UserError: the loss was not finite.
            KeyboardInterrupt: Ctrl-C; its message says what is kept.
        """
        try:
            return self._run()
        except KeyboardInterrupt as stop:
            kept = f"{self.epoch} epochs are kept in {self.folder}" if self.folder and self.epoch else "nothing is kept"
            stop.args = (f"interrupted in epoch {self.epoch + 1}; {kept}",)
            raise

    def _run(self) -> Start:
        if self.folder is not None and not (self.folder / SETTINGS).exists():
            write_text(self.folder / SETTINGS, self.settings.to_json())
        began = time.monotonic() - self.seconds
        bar = tqdm(
            total=self.steps * self.train.epochs, initial=self.steps * self.epoch, desc="pretrain", unit="step",
            disable=not self.progress, dynamic_ncols=True, mininterval=0.5,
        )  # fmt: skip
        with bar:
            while self.epoch < self.train.epochs:
                loss = self._epoch(bar)
                held = self.held_loss()
                self.epoch += 1
                self.seconds = time.monotonic() - began
                self.history.append(
                    {"epoch": self.epoch, "loss": loss, "held_out_loss": held, "seconds": round(self.seconds, 2)}
                )
                bar.set_postfix(loss=f"{loss:.4f}", held=f"{held:.4f}")
                if self.folder is not None:
                    save_checkpoint(self.folder / CHECKPOINT, self.state())
                    write_text(self.folder / HISTORY, to_lines(self.history))
        start = self.start()
        if self.folder is not None:
            start.save(self.folder / START)
        return start

    def _epoch(self, bar: tqdm) -> float:
        self.model.train()
        total = torch.zeros((), device=self.fabric.device)
        for images, labels, _ in batches(self.split, self.train.batch_size, self.train.seed, self.epoch):
            x, _ = self.views(images, labels)
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.model(x, self.network.draw(len(x), x.device))
            self.fabric.backward(loss)
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            total += loss.detach() * len(x) / len(self.split)
            bar.update()
        mean = float(total)
        need(
            math.isfinite(mean),
            f"the loss became {mean} in epoch {self.epoch + 1}; lower `lr`. What was finished before is kept.",
        )
        return mean

    @torch.no_grad()
    def held_loss(self) -> float:
        """The loss on the held-out images, under the same masks at every call; nan where there are none."""
        if not len(self.held):
            return math.nan
        self.model.eval()
        masks, total = torch.Generator().manual_seed(self.train.seed), 0.0
        for x, _ in self.held.batches(self.train.batch_size, self.info.normalise):
            order = self.network.draw(len(x), x.device, masks)
            total += float(self.model(x, order)) * len(x) / len(self.held)
        return total

    def guesses(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Held-out images, what the network saw of them, and its guess, each (count, C, H, W), scaled (``DataInfo``).

        Needs patches that do not overlap. The guess has the mean and deviation of the true patches, which the loss
        leaves out.
        """
        network, part = self.network, self.held if len(self.held) >= count else self.split
        x = self.info.normalise(part.images[:count]).to(self.fabric.device)
        order = network.draw(len(x), x.device, torch.Generator().manual_seed(0))
        with torch.no_grad():
            patches = network.vit.patchify(x)
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True, correction=0)
            guess = network.guessed(x, order).float() * (variance + 1e-6).sqrt() + mean
        seen = torch.zeros_like(patches[..., :1]).scatter(1, order[:, : network.shown, None], 1.0)
        pictures = (patches, seen * patches, seen * patches + (1 - seen) * guess)
        real, shown, guessed = (self._picture(each) for each in pictures)
        return real, shown, guessed

    def _picture(self, patches: Tensor) -> Tensor:
        size, (rows, columns), info = self.settings.vit.patch_size, self.network.vit.grid, self.info
        image = patches.unflatten(1, (rows, columns)).unflatten(-1, (info.channels, size, size))
        image = image.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)[..., : info.height, : info.width]
        mean, std = (torch.tensor(v, device=image.device).view(-1, 1, 1) for v in (info.mean, info.std))
        return (image * std + mean).cpu()

    def start(self) -> Start:
        """The encoder, from which a training may start."""
        network = self.network
        source = f"pretrained on {self.settings.source}"
        return Start.of(network.vit, dict(network.weights.items()), self.info.scale, source)

    # Disk ----------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs."""
        cuda = torch.cuda.get_rng_state() if self.fabric.device.type == "cuda" else None
        return {
            "info": self.info.to_dict(), "epoch": self.epoch, "seconds": self.seconds, "history": self.history,
            "network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": cuda,
        }  # fmt: skip

    def restore(self) -> None:
        """Continues from the folder's checkpoint.

        Raises:
            UserError: there is none, or one of other images or another network.
        """
        assert self.folder is not None
        state = load_checkpoint(self.folder / CHECKPOINT, repair=True)
        need(self.info.is_that_of(state.get("info")), f"{self.folder} was pretrained on other images than these.")
        try:
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.epoch, self.seconds, self.history = state["epoch"], state["seconds"], list(state["history"])
            torch.set_rng_state(state["rng"])
            if state["cuda_rng"] is not None and self.fabric.device.type == "cuda":
                torch.cuda.set_rng_state(state["cuda_rng"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.folder / CHECKPOINT} does not fit {SETTINGS}: {why(error)}") from error
        write_text(self.folder / HISTORY, to_lines(self.history))  # a kill between the two files left an older one

"""Where a training may start: libraries, files and folders, by name (pyro_isingvit/starts.py)."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import TINY, tensors
from safetensors.torch import save_file
from torch.testing import assert_close
from torchvision import models

from inference.prune import data_of
from pyro_isingvit import (
    IsingConfig,
    IsingGuide,
    IsingViT,
    Start,
    TrainConfig,
    UserError,
    ViTConfig,
    experiment,
    fit,
    load_data,
    load_run,
    load_start,
    start_of,
)
from pyro_isingvit.core.pixels import Scale
from pyro_isingvit.core.settings import DataConfig, RunConfig
from pyro_isingvit.experiment import train_run
from pyro_isingvit.ising import lean
from pyro_isingvit.nets.libraries import convertible

VIT = ViTConfig(patch_size=4, width=16, heads=2, depth=2, mlp_ratio=2)


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", train_size=100)


@pytest.fixture(scope="module")
def run(digits):
    return fit(VIT, digits, epochs=3, device="cpu", target_retention=0.5, max_keep=0.9, progress=False)


def same(start, vit, weights):
    for kind, value in start.weights.items():
        assert_close(value, weights[kind].detach(), rtol=0, atol=0)
    own = dict(vit.named_parameters())
    for name, value in start.others.items():
        assert_close(value, own[name].detach(), rtol=0, atol=0)


def test_a_run_is_a_start_for_other_classes(run, digits, tmp_path):
    start = load_start(str(run.save(tmp_path / "run")))
    [(vit, weights)] = run.method.trained_networks()
    same(start, vit, weights)
    assert start.scale == run.info.scale and "head" not in start.weights
    again = fit(start, digits, method="deterministic", epochs=1, lr=1e-9, device="cpu", progress=False)
    moved = (again.method.loc["qkv"] - weights["qkv"]).abs().max()
    assert float(moved.detach()) < 1e-6 and again.config.vit == run.config.vit


def test_a_pruned_network_is_a_start_and_stays_pruned(run, digits, tmp_path):
    small = run.prune(keep=0.4)
    small.save_pretrained(tmp_path)
    start = load_start(str(tmp_path))
    empty = ~(start.weights["fc1"].any(2) & start.weights["fc2"].any(1))
    assert empty.any()
    again = fit(start, digits, method="deterministic", epochs=3, device="cpu", progress=False)
    left = again.method.loc["fc1"].detach().any(2) & again.method.loc["fc2"].detach().any(1)
    assert not left[empty].any()


@pytest.mark.parametrize("method", ["magnitude", "ising-sparse"])
def test_what_was_off_for_good_is_no_weight_to_start_from(method, digits, tmp_path):
    run = fit(VIT, digits, method=method, epochs=8, finetune_epochs=1, device="cpu", progress=False, lr=1e-2,
              target_retention=0.5, max_keep=0.9, update_every=1, mask_damping=0.5, sparsity=0.6)  # fmt: skip
    start = load_start(str(run.save(tmp_path / method)))
    kept = run.method.kept()
    off = sum(int((pi <= 0.5).sum()) for kind, pi in kept.items() if kind != "head")
    assert off > 0
    for kind, weight in start.weights.items():
        assert not weight[(kept[kind] <= 0.5).expand_as(weight)].any() and weight.any()


def test_an_ensemble_is_no_start(digits, tmp_path):
    run = fit(VIT, digits, method="ensemble", members=2, epochs=1, device="cpu", progress=False)
    with pytest.raises(UserError, match="several networks"):
        load_start(str(run.save(tmp_path / "run")))


@pytest.mark.parametrize("method", ["ising", "dropout"])
def test_a_started_run_is_saved_and_loaded(method, run, digits, tmp_path):
    [(vit, weights)] = run.method.trained_networks()
    start = Start.of(vit, dict(weights), run.info.scale, "made")
    again = fit(start, digits, method=method, epochs=2, device="cpu", progress=False)
    loaded = load_run(again.save(tmp_path / "again"))
    assert loaded.config.init == "made"
    x = digits.test.images[:5]
    assert torch.equal(loaded.predict(x, 4).probs, again.predict(x, 4).probs)
    [(vit, _)] = loaded.method.trained_networks()
    assert vit.centred and vit.centre("qkv").any()
    if method == "ising":
        assert loaded.prune(form="mean").predict(x).shape == (1, 5, 10)


def test_a_model_around_a_start_trains_in_place(run, digits):
    [(vit, weights)] = run.method.trained_networks()
    start = Start.of(vit, dict(weights), Scale(None, (), (), (0.1,), (0.9,)), "made")
    model = IsingViT.from_pretrained(start, digits)
    assert model.info.mean == (0.1,) and torch.equal(model.vit.centre("qkv"), weights["qkv"].detach())
    before = {name: value.clone() for name, value in tensors(model).items()}
    again = fit(model, digits, epochs=2, device="cpu", progress=False)
    assert again.model is model and again.info.mean == (0.1,)
    assert torch.equal(model.vit.centre("qkv"), before["vit.centre_qkv"])


def test_a_model_around_a_start_keeps_its_first_blocks(run, digits):
    [(vit, weights)] = run.method.trained_networks()
    start = Start.of(vit, dict(weights), run.info.scale, "made")
    ising = IsingConfig(bayesian_blocks=1)
    model = IsingViT.from_pretrained(start, digits, ising, frozen_blocks=1)
    before = {name: value.detach().clone() for name, value in model.vit.trunk.items()}
    again = fit(model, digits, epochs=1, device="cpu", progress=False)
    assert again.config.train.frozen_blocks == 1
    assert all(torch.equal(value, before[name]) for name, value in model.vit.trunk.items())
    with pytest.raises(UserError, match=r"first 0 blocks are frozen; give it to `IsingViT\.from_pretrained`"):
        fit(IsingViT.from_pretrained(start, digits, ising), digits, frozen_blocks=1, epochs=1, progress=False)
    with pytest.raises(UserError, match="`frozen_blocks` 5 of 2 blocks cannot be"):
        fit(start, digits, method="dropout", frozen_blocks=5, epochs=1, device="cpu", progress=False)


def test_a_large_model_around_a_start_begins_at_its_very_weights(run, digits, monkeypatch):
    """Its centre is kept in 16 bits."""
    monkeypatch.setattr(lean, "LARGE", 100)
    [(vit, weights)] = run.method.trained_networks()
    model = IsingViT.from_pretrained(Start.of(vit, dict(weights), Scale(None, (), (), (0.1,), (0.9,)), "made"), digits)
    assert model.vit.centre("qkv").dtype == torch.bfloat16
    assert torch.equal(IsingGuide(model, 100).loc["qkv"].detach(), weights["qkv"].detach())


def test_other_images_are_noticed_when_a_started_run_is_resumed(run, tmp_path, monkeypatch):
    start = run.save(tmp_path / "start")
    rng = np.random.default_rng(0)

    def write(classes):
        x, y = rng.integers(0, 255, (60, 8, 8), dtype=np.uint8), np.arange(60) % classes
        np.savez(tmp_path / "data.npz", train_images=x, train_labels=y, test_images=x, test_labels=y)

    write(3)
    train = TrainConfig(epochs=1, batch_size=20, samples=2, val_samples=2, device="cpu")
    config = RunConfig(
        data=DataConfig(dataset=f"npz:{tmp_path / 'data.npz'}"), vit=VIT, train=train, init=str(start), method="dropout"
    )
    train_run(config, tmp_path / "run", progress=False)
    kept = RunConfig.from_json((tmp_path / "run" / "config.json").read_text())
    train_run(kept, tmp_path / "run", resume=True, progress=False)
    with monkeypatch.context() as patch:  # of several processes, none may download, nor needs to when resuming
        patch.setattr(experiment, "launched", lambda: (2, 1))
        asked = replace(kept, data=replace(kept.data, download=True))
        with pytest.raises(UserError, match="download it first, in one process without torchrun, and leave out"):
            train_run(asked, tmp_path / "other", progress=False)
        train_run(asked, tmp_path / "run", resume=True, progress=False)
    write(4)
    with pytest.raises(UserError, match="other images"):
        train_run(kept, tmp_path / "run", resume=True, progress=False)


def test_a_run_keeps_the_scale_of_its_start_when_it_is_resumed_and_pruned(run, tmp_path):
    """16 bits, of which the start had other percentiles."""
    [(vit, weights)] = run.method.trained_networks()
    start = Start.of(vit, dict(weights), Scale("uint16", (100.0,), (900.0,), (0.4,), (0.2,)), "made")
    start.save(tmp_path / "start.safetensors")
    rng, y = np.random.default_rng(0), np.arange(60) % 3
    x = rng.integers(0, 2000, (60, 8, 8), dtype=np.uint16)
    np.savez(tmp_path / "data.npz", train_images=x, train_labels=y, test_images=x, test_labels=y)
    config = RunConfig(
        data=DataConfig(dataset=f"npz:{tmp_path / 'data.npz'}", intensity="percentile 5 95"), vit=VIT,
        train=TrainConfig(epochs=1, batch_size=20, samples=2, val_samples=2, device="cpu"),
        init=str(tmp_path / "start.safetensors"),
    )  # fmt: skip
    train_run(config, tmp_path / "run", progress=False)
    kept = load_run(tmp_path / "run")
    assert (kept.info.low, kept.info.high, kept.info.mean) == ((100.0,), (900.0,), (0.4,))
    assert data_of(kept, None).info == kept.info
    train_run(kept.config, tmp_path / "run", resume=True, progress=False)


SMALL = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}


def test_networks_in_memory_and_what_they_normalise_by(digits):
    net = models.VisionTransformer(8, 4, **SMALL)
    start = start_of(net)
    assert start.scale.mean == (0.485, 0.456, 0.406) and start.source == "VisionTransformer"
    with pytest.raises(UserError, match="reads 3 channels; give `mean` and `std`"):
        start_of(net, mean=(0.5,))
    timm = pytest.importorskip("timm")
    assert start_of(timm.create_model("vit_tiny_patch16_224")).scale.mean == (0.5, 0.5, 0.5)


@pytest.fixture
def small_vit(monkeypatch):
    """vit_b_16 of torchvision at a size that a test can afford."""
    build = models.get_model

    def get_model(name, weights=None, image_size=224):
        assert weights is None, "nothing is downloaded here"
        return models.VisionTransformer(image_size, 16, **SMALL) if name == "vit_b_16" else build(name)

    monkeypatch.setattr(models, "get_model", get_model)
    return models.VisionTransformer(224, 16, **SMALL)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_of_a_library(suffix, small_vit, tmp_path):
    path = tmp_path / f"weights.{suffix}"
    state = small_vit.state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save({"model": state}, path)
    start = load_start(f"torchvision:vit_b_16@{path}")
    assert start.image_shape == (3, 224, 224) and start.scale.std == (0.229, 0.224, 0.225)
    assert torch.equal(start.weights["qkv"][0], state["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"])


@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_a_file_of_an_older_library_another_size_and_another_head(prefix, small_vit, tmp_path):
    """As the published files of torchvision are: their MLPs have the names of its version 0.11."""
    net = models.VisionTransformer(48, 16, num_classes=7, **SMALL)
    state = {
        n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for n, v in net.state_dict().items()
    }
    torch.save({"state_dict": {prefix + name: value.half() for name, value in state.items()}}, tmp_path / "old.pth")
    start = load_start(f"torchvision:vit_b_16@{tmp_path / 'old.pth'}")
    assert start.image_shape == (3, 48, 48)
    assert_close(start.weights["fc2"][0], net.encoder.layers[0].mlp[3].weight.detach(), rtol=1e-3, atol=1e-4)
    assert_close(start.others["position"], net.encoder.pos_embedding[0].detach(), rtol=1e-3, atol=1e-4)
    half = {name: value for name, value in state.items() if "linear_2" not in name}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"lacks 2 tensor\(s\): encoder.layers.encoder_layer_0.mlp.3.weight"):
        load_start(f"torchvision:vit_b_16@{tmp_path / 'half.pth'}")


def test_a_file_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64)
    wrapped = {f"model._orig_mod.{name}": value for name, value in net.state_dict().items()}  # Lightning, compiled
    torch.save({"state_dict": wrapped}, tmp_path / "t.pth")
    start = load_start(f"timm:vit_tiny_patch16_224@{tmp_path / 't.pth'}")
    assert torch.equal(start.weights["fc1"][3], net.blocks[3].mlp.fc1.weight.detach())
    assert start.image_shape == (3, 64, 64)
    assert torch.equal(start.others["position"], net.pos_embed[0].detach())  # not interpolated
    for name in ("vit_small_patch16_224", "deit3_small_patch16_224"):
        with pytest.raises(UserError, match=f"t.pth holds no weights of timm:{name}"):
            load_start(f"timm:{name}@{tmp_path / 't.pth'}")
    with pytest.raises(UserError, match="has patches of 16 pixels, timm:vit_small_patch32_224 reads patches of 32"):
        load_start(f"timm:vit_small_patch32_224@{tmp_path / 't.pth'}")
    with pytest.raises(UserError, match=r"timm has no weights 'vit_tiny_patch16_224\.wrong'"):
        load_start(f"timm:vit_tiny_patch16_224.wrong@{tmp_path / 't.pth'}")
    torch.save({name: value for name, value in net.state_dict().items() if "norm1" not in name}, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"Missing key.*blocks\.0\.norm1\.weight"):
        load_start(f"timm:vit_tiny_patch16_224@{tmp_path / 'less.pth'}")
    broken = net.state_dict()
    broken["blocks.0.norm1.weight"][0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.norm1\.weight is not finite"):
        load_start(f"timm:vit_tiny_patch16_224@{tmp_path / 'nan.pth'}")


def test_a_file_of_deit_as_its_authors_wrote_it(tmp_path):
    timm = pytest.importorskip("timm")
    net = timm.create_model("deit3_small_patch16_224", img_size=32)
    state = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for name, v in net.state_dict().items()
    }
    torch.save({"model": state}, tmp_path / "deit.pth")
    start = load_start(f"timm:deit3_small_patch16_224@{tmp_path / 'deit.pth'}")
    assert_close(start.weights["fc1"][0], net.blocks[0].mlp.fc1.weight.detach())


def test_timm_takes_what_it_has_fetched_by_its_path(monkeypatch, tmp_path):
    """By its name, it would ask the Hub for a newer one."""
    timm, hub = pytest.importorskip("timm"), pytest.importorskip("huggingface_hub")
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "model.safetensors")

    def from_cache(repo, name):
        return str(tmp_path / name) if (tmp_path / name).is_file() else None

    monkeypatch.setattr(hub, "try_to_load_from_cache", from_cache)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    assert load_start("timm:vit_tiny_patch16_224").vit.width == 192


def test_what_a_library_has_fetched_before_needs_no_download(monkeypatch, tmp_path):
    """So that several processes can start from it, which may not download."""
    net = models.VisionTransformer(224, 16, **SMALL)
    monkeypatch.setattr(models, "get_model", lambda name, weights=None: net if weights is not None else None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="set `download`"):
        load_start("torchvision:vit_b_16")
    (tmp_path / "checkpoints").mkdir()
    url = models.get_model_weights("vit_b_16")["DEFAULT"].url
    (tmp_path / "checkpoints" / url.rpartition("/")[2]).touch()
    assert load_start("torchvision:vit_b_16").vit.width == 16


def test_files_that_do_not_fit(small_vit, tmp_path):
    state = small_vit.state_dict()
    missing = {name: value for name, value in state.items() if name != "class_token"}
    torch.save(missing, tmp_path / "missing.pth")
    with pytest.raises(UserError, match=r"lacks 1 tensor\(s\): class_token"):
        load_start(f"torchvision:vit_b_16@{tmp_path / 'missing.pth'}")
    torch.save(state | {"more": torch.ones(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"1 tensor\(s\): more"):
        load_start(f"torchvision:vit_b_16@{tmp_path / 'more.pth'}")
    torch.save(state | {"class_token": torch.ones(2)}, tmp_path / "shape.pth")
    with pytest.raises(UserError, match=r"class_token is of shape \(2,\)"):
        load_start(f"torchvision:vit_b_16@{tmp_path / 'shape.pth'}")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds no tensors by name"):
        load_start(f"torchvision:vit_b_16@{tmp_path / 'list.pth'}")


def test_a_pickle_that_runs_code_is_not_loaded(small_vit, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("evil code ran",))

    torch.save({"class_token": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="may run code is not loaded"):
        load_start(f"torchvision:vit_b_16@{tmp_path / 'evil.pth'}")


def test_downloads_happen_only_when_asked_for(monkeypatch):
    with pytest.raises(UserError, match="set `download` to let the library fetch them, or give a file"):
        load_start("torchvision:vit_b_16")

    def no_network(name, weights=None, **_):
        assert weights is not None
        raise OSError("no route to host")

    monkeypatch.setattr(models, "get_model", no_network)
    with pytest.raises(UserError, match="could not be downloaded: no route to host"):
        load_start("torchvision:vit_b_16", download=True)


@pytest.mark.parametrize("spec, message", [
    ("torchvision:resnet18", "no vision transformer 'resnet18'"),
    ("nothing", "is no folder and no .safetensors file"),
    ("nothing.safetensors", "there is no file"),
    ("torchvision:vit_b_16@nothing.pth", "there is no file nothing.pth"),
])  # fmt: skip
def test_what_is_not_there(spec, message):
    with pytest.raises(UserError, match=message):
        load_start(spec)


def test_folders_without_anything(tmp_path):
    with pytest.raises(UserError, match="neither a run"):
        load_start(str(tmp_path))


def test_timm_by_name():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"no model 'vit_tiny_patch16_22' \(did you mean vit_tiny_patch16_224"):
        load_start("timm:vit_tiny_patch16_22")
    with pytest.raises(UserError, match="not in this package"):
        load_start("timm:vit_tiny_patch16_224")


def test_every_vision_transformer_of_torchvision_works():
    found = dict(convertible("torchvision"))
    assert set(found) == {"vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32"} and not any(found.values())
    with pytest.raises(UserError, match="unknown library"):
        list(convertible("keras"))


def test_small_images_are_said(digits, caplog):
    start = start_of(models.VisionTransformer(224, 16, **SMALL))
    with pytest.raises(UserError):
        fit(start, digits, epochs=1, device="cpu", progress=False)
    assert "resize them with `image_size`" in caplog.text
    assert TINY.prefix == 0

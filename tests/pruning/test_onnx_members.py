"""One ONNX file of K networks: equal to as many draws in Python, at every batch size."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from helpers import INFO, TINY, around, make_pair
from torch import Tensor

from pyro_isingvit import CompactViT, PredictiveDraws, UserError, compact
from pyro_isingvit.core.settings import ViTConfig
from pyro_isingvit.pruning.export import export_onnx
from pyro_isingvit.pruning.onnx_members import OUTPUTS, Members, export_members
from pyro_isingvit.pruning.onnx_predict import predict_onnx

K, SEED = 5, 3
# Granularity and shape; blocks without posterior below, a head alone, CLS, registers, a stem, two-layer head.
CASES: dict[str, tuple[str, ViTConfig, int | None]] = {
    "unit": ("unit", TINY, None),
    "weight": ("weight", replace(TINY, pool="cls", head="mlp", patch_size=3), None),
    "partly": ("unit", TINY, 1),
    "head": ("unit", replace(TINY, head="mlp"), 0),
    "stem": ("head", replace(TINY, stem="conv", registers=2, depth=1), None),
}


def sampled(name: str) -> CompactViT:
    torch.manual_seed(0)
    granularity, vit, blocks = CASES[name]
    model, guide = make_pair(vit=vit, granularity=granularity, bayesian_blocks=blocks)
    with torch.no_grad():
        for parameter in model.vit.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for site in guide.layout.sites:  # retention from 0.5 to 0.9: something is left, and draws differ
            guide.field(site).copy_(guide.field(site).abs() + 0.3)
        for scale in guide.log_scale.values():
            scale.fill_(-1.5)
    model.temperature.fill_(0.8)
    return compact(around(model, guide), "bayes", threshold=0.2)


def images(batch: int) -> Tensor:
    return torch.randint(0, 256, (batch, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CompactViT, Path]]:
    made = {}
    for name in CASES:
        model, path = sampled(name), tmp_path_factory.mktemp(name) / "members.onnx"
        assert export_members(model, path, K, SEED) <= 1e-5
        assert [*path.parent.iterdir()] == [path]  # one file, no weights beside it
        made[name] = model, path
    return made


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3, 7])
def test_the_file_says_what_the_draws_say(name: str, batch: int, files: dict[str, tuple[CompactViT, Path]]) -> None:
    model, path = files[name]
    x = images(batch)
    draws = PredictiveDraws(model.predict(x, K, SEED))
    found = predict_onnx(path, x, chunk=4)
    wanted = [draws.mean, *draws.interval(0.9), draws.entropy, draws.mutual_information]
    given = [found.probs, found.lower, found.upper, found.entropy, found.mutual_information]
    for a, b in zip(given, wanted, strict=True):
        torch.testing.assert_close(a, b.float(), atol=1e-5, rtol=0)
    assert (found.upper - found.lower).max() > 0.01 and found.mutual_information.max() > 1e-3  # draws do differ


def test_what_is_common_is_stored_and_run_once(files: dict[str, tuple[CompactViT, Path]]) -> None:
    import onnx

    model, path = files["partly"]
    graph = onnx.load(path).graph
    drawn = sum(value.numel() for value in model.draw().values())
    stored = sum(int(np.prod(value.dims)) for value in graph.initializer if value.data_type == onnx.TensorProto.FLOAT)
    assert 0 < stored - K * drawn < sum(value.numel() for value in model.parameters()) - drawn + 20
    assert all(not path.startswith(("patch", "blocks.0")) for path in model.config.posteriors)  # the trunk of this test
    whole = onnx.load(files["unit"][1]).graph
    stacked = [[value for value in g.initializer if len(value.dims) == 3 and value.dims[0] == K and value.dims[1] > 1]
               for g in (graph, whole)]  # fmt: skip
    assert len(stacked[0]) == len(model.config.posteriors) < len(stacked[1])
    tokens: list[int] = []
    members = Members(model, K, SEED)
    for block in members.network.blocks:
        block.register_forward_hook(lambda _, given, __: tokens.append(len(given[0])))
    members(torch.zeros(2, 1, 4, 4))
    assert tokens == [2, 2]  # the second block itself gives every member its own


def test_one_member_disagrees_with_nobody(tmp_path: Path) -> None:
    model, path = sampled("unit"), tmp_path / "m.onnx"
    export_members(model, path, 1)
    found = predict_onnx(path, images(4))
    assert not found.mutual_information.any() and found.lower.equal(found.upper) and found.lower.equal(found.probs)


def test_metadata(files: dict[str, tuple[CompactViT, Path]]) -> None:
    import onnx

    proto = onnx.load(files["unit"][1])
    said = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert (said["members"], said["seed"], said["interval"], said["classes"]) == (K, SEED, 0.9, list(INFO.classes))
    assert said["mean"] == [0.5] and said["std"] == [0.25] and said["temperature"] == pytest.approx(0.8)
    assert [value.name for value in proto.graph.output] == list(OUTPUTS)


def test_one_network_reads_like_many(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, guide = make_pair(vit=TINY, granularity="unit")
    small, path, x = compact(around(model, guide)), tmp_path / "one.onnx", images(5)
    export_onnx(small, path)
    found = predict_onnx(path, x.numpy())
    torch.testing.assert_close(found.probs, small.predict(x)[0], atol=1e-5, rtol=0)
    assert found.lower.equal(found.probs) and not found.mutual_information.any() and found.classes == INFO.classes


@pytest.mark.parametrize(("members", "words"), [(0, "not 0"), (-1, "not -1"), (501, "not 501")])
def test_members_out_of_range(members: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        export_members(sampled("unit"), tmp_path / "m.onnx", members)
    assert not [*tmp_path.iterdir()]


def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide = make_pair(vit=TINY, granularity="unit")
    with pytest.raises(UserError, match="only 'bayes'"):
        export_members(compact(around(model, guide)), tmp_path / "m.onnx", 3)
    monkeypatch.setattr("pyro_isingvit.pruning.onnx_members.LARGEST", 1000)
    with pytest.raises(UserError, match="choose fewer `members`"):
        export_members(sampled("unit"), tmp_path / "m.onnx", 3)
    assert not [*tmp_path.iterdir()]


def test_nothing_is_left_where_the_file_cannot_be(tmp_path: Path) -> None:
    model = sampled("head")
    place = tmp_path / "file"
    place.write_text("x")
    with pytest.raises(UserError, match="cannot write"):  # root may write to a read-only folder, not into a file
        export_members(model, place / "m.onnx", 2)
    for number in (errno.ENOSPC, errno.EROFS):
        with patch("onnx.save", side_effect=OSError(number, "no room")), pytest.raises(UserError, match="no room"):
            export_members(model, tmp_path / "m.onnx", 2)
    monkey = patch("pyro_isingvit.pruning.onnx_members.TOLERANCE", -1.0)
    with monkey, pytest.raises(UserError, match="is not written"):
        export_members(model, tmp_path / "m.onnx", 2)
    assert [*tmp_path.iterdir()] == [place]


def test_files_and_images_that_do_not_fit(files: dict[str, tuple[CompactViT, Path]], tmp_path: Path) -> None:
    import onnx

    path = files["unit"][1]
    for wrong, words in [(torch.zeros(2, 1, 5, 4, dtype=torch.uint8), "reads"), (torch.zeros(2, 1, 4, 4), "uint8"),
                         (images(0), "no images")]:  # fmt: skip
        with pytest.raises(UserError, match=words):
            predict_onnx(path, wrong)
    with pytest.raises(UserError, match="`chunk`"):
        predict_onnx(path, images(1), chunk=0)
    with pytest.raises(UserError, match="is no file"):
        predict_onnx(tmp_path / "none.onnx", images(1))
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="damaged or no ONNX"):
        predict_onnx(damaged, images(1))
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, damaged)
    with pytest.raises(UserError, match="not exported by this library"):
        predict_onnx(damaged, images(1))

"""Repositories of the Hugging Face Hub, up to the border of huggingface_hub: no connection is opened."""

import shutil
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from helpers import here, refused

from pyro_isingvit import CompactViT, TrainedRun, compact, load_run
from pyro_isingvit.core.errors import UserError
from pyro_isingvit.data.load import load_data
from pyro_isingvit.pruning.card import FILES
from pyro_isingvit.sharing.hub import check_repo, locate, upload


class Hub:
    """What was sent, and a place that a repository is fetched from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
        self.kept, self.calls, self.tokens = kept, [], []
        hub = self

        class Api(huggingface_hub.HfApi):
            def __init__(self, *args, token=None, **kwargs):
                super().__init__(*args, token=token, **kwargs)
                hub.tokens.append(token)

        def create_repo(_, repo_id, **kwargs):
            hub.calls.append(("create_repo", repo_id, kwargs))

        def upload_folder(_, *, repo_id, folder_path, allow_patterns, **kwargs):
            hub.calls.append(("upload_folder", repo_id, kwargs))
            target = kept / repo_id
            for pattern in allow_patterns:
                for path in Path(folder_path).glob(pattern):
                    (target / path.relative_to(folder_path)).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, target / path.relative_to(folder_path))
            return f"https://hub.invalid/{repo_id}/commit/1"

        def snapshot_download(repo_id, **kwargs):
            hub.calls.append(("snapshot_download", repo_id, kwargs))
            return str(kept / repo_id)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    return Hub(monkeypatch, tmp_path / "hub")


PATHS = ("owner/name/x", "../x", "/abs", "/abs/x", "name", "", "owner/", "/", "./x", "~/x", "a/..", "a\\b/c", "a/b c",
         "a--b/c", "a/b.git", "a/b\n", "é/x", "a/" + 95 * "b", "hf://a/b")  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_no_repositories(name: str, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="owner/name"):
        check_repo(name)
    with pytest.raises(UserError, match="owner/name"):
        upload(tmp_path, name, ["*"])
    if not Path(name).is_dir():
        for load in (TrainedRun.from_pretrained, CompactViT.from_pretrained):
            with pytest.raises(UserError, match="owner/name"):
                load(name)
    assert not hub.calls


def test_a_run_goes_to_the_hub_and_comes_back(hub: Hub, digits_run: Path) -> None:
    run = load_run(digits_run)
    address = run.push_to_hub("owner/digits", private=True, token="t0k", commit_message="first", license="mit")
    assert address == "https://hub.invalid/owner/digits/commit/1" and hub.tokens == ["t0k"]
    assert hub.calls == [
        ("create_repo", "owner/digits", {"private": True, "exist_ok": True}),
        ("upload_folder", "owner/digits", {"commit_message": "first"}),
    ]
    sent = sorted(str(path.relative_to(hub.kept / "owner/digits")) for path in hub.kept.rglob("*") if path.is_file())
    assert sent == ["README.md", "config.json", "figures/calibration.png", "metrics.json", "model.safetensors"]
    assert 'from_pretrained("owner/digits")' in (hub.kept / "owner/digits/README.md").read_text()
    again = TrainedRun.from_pretrained("owner/digits", revision="v1", token="t0k", cache_dir="c", local_files_only=True)
    name, repo, options = hub.calls[-1]
    assert (name, repo) == ("snapshot_download", "owner/digits") and "model.safetensors" in options.pop(
        "allow_patterns"
    )
    assert options == {"revision": "v1", "token": "t0k", "cache_dir": "c", "local_files_only": True}
    images = load_data("digits").test.images[:5]
    assert torch.equal(again.predict(images, 4).probs, run.predict(images, 4).probs)
    assert again.folder is None  # nothing is written to the cache


def test_a_compact_network_goes_to_the_hub_and_comes_back(hub: Hub, digits_run: Path) -> None:
    small = compact(load_run(digits_run), keep=0.5)
    small.push_to_hub("owner/small", metrics={"accuracy": 0.5, "run": "/home/me/runs"}, license="mit")
    assert sorted(path.name for path in (hub.kept / "owner/small").iterdir()) == [
        "README.md", "compact.json", "compact.safetensors", "metrics.json"
    ]  # fmt: skip
    assert "/home/me" not in (hub.kept / "owner/small/metrics.json").read_text()
    again = CompactViT.from_pretrained("owner/small", revision="v1")
    assert hub.calls[-1][0] == "snapshot_download" and hub.calls[-1][2]["revision"] == "v1"
    images = load_data("digits").test.images[:5]
    assert torch.equal(again.predict(images), small.predict(images))


def test_a_folder_wins_over_a_repository(hub: Hub, digits_run: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    load_run(digits_run).save_pretrained("owner/name")
    TrainedRun.from_pretrained("owner/name")
    assert not hub.calls
    (tmp_path / "owner" / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        locate("owner/file", ["*"])
    with pytest.raises(UserError, match=r"holds no shared run"):  # a Path is never a repository
        TrainedRun.from_pretrained(Path("owner/other"))
    assert not hub.calls


def test_without_huggingface_hub_the_extra_is_named(monkeypatch, digits_run: Path, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    run = load_run(digits_run)
    for call in (lambda: run.push_to_hub("a/b"), lambda: TrainedRun.from_pretrained("a/b"),
                 lambda: CompactViT.from_pretrained("a/b")):  # fmt: skip
        with pytest.raises(UserError, match=r"pyro-isingvit\[hub\]"):
            call()
    TrainedRun.from_pretrained(run.save_pretrained(tmp_path / "x"))  # folders need none


def test_without_a_place_for_temporary_files(hub: Hub, digits_run: Path, monkeypatch) -> None:
    def none(*_, **__):
        raise OSError(30, "Read-only file system")

    run = load_run(digits_run)
    small = compact(run, keep=0.5)
    monkeypatch.setattr("tempfile.mkdtemp", none)
    for net in (run, small):
        with pytest.raises(UserError, match="Read-only file system"):
            net.push_to_hub("a/b")
    with pytest.raises(UserError, match="Read-only file system"):
        run.save_pretrained("x")
    assert not hub.calls


def test_what_the_hub_refuses_is_one_clear_line(monkeypatch, digits_run: Path) -> None:
    def fails(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fails)
    with pytest.raises(UserError, match=r"there is no folder a/b, and .* cannot be fetched \(cannot find it\)"):
        TrainedRun.from_pretrained("a/b")
    with pytest.raises(UserError, match=r"a/b cannot be written \(cannot find it\)"):
        load_run(digits_run).push_to_hub("a/b")


def test_the_script_sends_exactly_the_folder(hub: Hub, digits_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "shared"
    told = here("inference.share", "--run", digits_run, "--out", out, "--license", "mit")
    assert told.returncode == 0 and "README.md" in told.stdout and not hub.calls, told.stderr
    (out / "private.txt").write_text("not ours")
    told = here("inference.share", "--run", out, "--repo", "owner/name", "--private")
    assert told.returncode == 0 and "hub.invalid" in told.stdout, told.stderr
    assert hub.calls[0] == ("create_repo", "owner/name", {"private": True, "exist_ok": True})
    sent = {path.relative_to(hub.kept / "owner/name"): path for path in hub.kept.rglob("*") if path.is_file()}
    assert {str(name) for name in sent} == {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {
        "private.txt"
    }
    assert all(path.read_bytes() == (out / name).read_bytes() for name, path in sent.items())


def test_the_script_shares_a_compact_network(hub: Hub, digits_run: Path, tmp_path: Path) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    told = here("inference.prune", "--run", digits_run, "--out", small, "--keep", 0.5, "--repeats", 1)
    assert told.returncode == 0, told.stderr
    told = here("inference.share", "--run", small, "--out", out, "--license", "mit", "--repo", "owner/small")
    assert told.returncode == 0, told.stderr
    card = (out / "README.md").read_text()
    assert "| Accuracy |" in card and " to " in card and str(tmp_path) not in card
    assert str(tmp_path) not in (out / "metrics.json").read_text() + (out / "compact.json").read_text()
    assert (
        {path.name for path in (hub.kept / "owner/small").iterdir()}
        == set(FILES)
        == {path.name for path in out.iterdir()}
    )
    refused(here("inference.share", "--run", small, "--out", out), "holds a compact network")
    refused(here("inference.share", "--run", small, "--out", digits_run), "holds a run")


def test_what_the_script_refuses(hub: Hub, digits_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for words, told in (
        (["--out", file], "is a file"), (["--out", file / "x"], "cannot write"),
        (["--out", digits_run], "name another"), ([], "--out"), (["--repo", "a/b"], "--out"),
        (["--out", tmp_path / "o", "--private"], "--repo"),
        (["--out", tmp_path / "o", "--repo", "a/b/c"], "owner/name"),
        (["--out", tmp_path / "o", "--license", "My own"], "mit"),
    ):  # fmt: skip
        refused(here("inference.share", "--run", digits_run, *words), told)
    refused(here("inference.share", "--run", tmp_path / "none", "--out", tmp_path / "o"), "there is no folder")
    refused(here("inference.share", "--run", tmp_path, "--out", tmp_path / "o"), "holds no run")
    assert not (tmp_path / "o").exists() and not hub.calls

"""The table of distilled networks."""

import json

from helpers import here, refused

from analysis.distillation import MARKERS


def pruned(folder, seed, accuracy, dataset="made", peers=True):
    folder.mkdir()
    scores = {"accuracy": accuracy, "nll": 0.5, "ece": 0.02}
    metrics = {
        "dataset": dataset,
        "train_size": 100,
        "seed": seed,
        "macs": 10,
        "dense_macs": 30,
        "run_macs": 20,
        "samples": 50,
        **scores,
    }
    metrics |= {f"full_{name}": value for name, value in scores.items()}
    metrics |= {"peers": {"GroupTaylor": scores | {"macs": 12}}} if peers else {}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def row(text, name):
    (line,) = [line for line in text.splitlines() if f"| {name} |" in line]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_seeds_share_a_row_and_other_data_stay(tmp_path):
    first, second = pruned(tmp_path / "a", 0, 0.8), pruned(tmp_path / "b", 1, 0.9)
    teacher, out, page = pruned(tmp_path / "t", 0, 0.95), tmp_path / "results.json", tmp_path / "page.md"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter")
    done = here("analysis.distillation", "--pruned", first, second, "--teacher", teacher, teacher, "--out", out)
    assert done.returncode == 0, done.stderr
    assert row(done.stdout, "teacher, 50 draws")[2:] == ["10", "0.950 ± 0.000", "0.500 ± 0.000", "0.020 ± 0.000", "2"]
    assert row(done.stdout, "cut and distilled, one pass")[:4] == [
        "made, 100", "cut and distilled, one pass", "10", "0.850 ± 0.071"]  # fmt: skip
    assert row(done.stdout, "the run that was cut, 50 draws")[2] == "20"
    assert row(done.stdout, "plain, GroupTaylor, distilled alike")[2] == "12"
    other = pruned(tmp_path / "c", 0, 0.7, "other", peers=False)
    done = here("analysis.distillation", "--pruned", other, "--out", out, "--page", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after") and "old" not in text
    assert text.count("made, 100") == 4 and text.count("other, 100") == 2  # no teacher and no peer was named


def test_what_cannot_be_shown_is_refused(tmp_path):
    first = pruned(tmp_path / "a", 0, 0.8)
    refused(here("analysis.distillation", "--pruned", tmp_path / "nowhere"), "metrics.json cannot be read")
    refused(here("analysis.distillation", "--pruned", first, "--teacher", first, first), "in the same order")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.json").write_text('{"dataset": "made", "train_size": 9, "seed": 0, "accuracy": 0.5}')
    refused(here("analysis.distillation", "--pruned", tmp_path / "run"), "lacks", "folders of inference.prune")
    (tmp_path / "r.json").write_text("[{}]")
    refused(here("analysis.distillation", "--pruned", first, "--out", tmp_path / "r.json"), "damaged")

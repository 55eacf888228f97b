"""What is told of images to predict: what was done to them, and which of them training has seen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.info import DataInfo
from pyro_isingvit.data.inputs import learned_from, load_inputs
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.streamed import open_stream

GREY = DataInfo("a", ("cat", "dog"), 1, 4, 4, (0.5,), (1.0,))


def write(folder: Path, count: int = 4, size: tuple[int, int] = (4, 4), mode: str = "L") -> Path:
    """A class folder each for cats and dogs."""
    for name in GREY.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new(mode, size, 20 * i if mode == "L" else (20 * i, 0, 9)).save(folder / name / f"{i}.png")
    return folder


def told(caplog, given: Path | str, source: DataConfig | None = None, info: DataInfo = GREY) -> list[str]:
    """The warnings, which both ways of opening images give."""
    found = list[list[str]]()
    for way in (load_inputs, open_stream):
        caplog.clear()
        opened = way(str(given), info, source=source)
        if way is open_stream:
            list(opened.parts(3, range(-(-len(opened) // 3))))
        found.append([record.getMessage() for record in caplog.records])
    assert sorted(found[0]) == sorted(found[1])
    return found[0]


def test_files_that_are_changed_are_told_of(tmp_path, caplog) -> None:
    assert told(caplog, write(tmp_path / "same")) == []
    write(tmp_path / "mixed" / "large", size=(9, 4))
    write(tmp_path / "mixed" / "colour", mode="RGB")
    write(tmp_path / "mixed" / "same", count=1)
    expected = ["8 of 18 images resized to 4x4", "8 of 18 images have colours and were made grey, as the run's are"]
    assert told(caplog, tmp_path / "mixed") == expected
    (tmp_path / "table.csv").write_text("path\n" + "\n".join(f"mixed/large/cat/{i}.png" for i in range(3)))
    assert told(caplog, f"csv:{tmp_path / 'table.csv'}") == ["3 of 3 images resized to 4x4"]
    other = write(tmp_path / "other", count=5, size=(3, 5))
    assert told(caplog, f"imagefolder:{other}") == ["2 of 2 images resized to 4x4"]  # its test part


def test_files_of_16_bits_for_a_run_of_8_are_told_of(tmp_path, caplog) -> None:
    folder = write(tmp_path / "both", count=2)
    Image.fromarray(np.full((4, 4), 4000, np.uint16)).save(folder / "cat" / "deep.png")  # of a camera of 12 bits
    expected = ["1 of 5 images have 16 bits, of which 8 were kept, as the run's have: what was below 256 is black now"]
    assert told(caplog, folder) == expected


def test_names_with_control_characters_are_read_too(tmp_path, caplog) -> None:
    other = write(tmp_path / "other", count=6)
    for file in other.glob("*/*.png"):
        file.rename(file.with_name(f"a\n{file.name}"))
    assert told(caplog, f"imagefolder:{other}") == []


@pytest.mark.parametrize("form", ["flat", "parts", "table", "table of splits"])
def test_training_files_are_told_of(tmp_path, caplog, form: str) -> None:
    """However they are named; those of a test part are none."""
    root = tmp_path / "img"
    if form == "parts":
        for part in ("train", "valid", "test"):
            write(root / part)
    else:
        write(root, count=12)
    dataset = f"imagefolder:{root}"
    if form.startswith("table"):
        split = lambda i: f",{'test' if i > 7 else 'train'}" if form != "table" else ""  # noqa: E731
        lines = [f"{name}/{i}.png,{name}{split(i)}" for name in GREY.classes for i in range(12)]
        (root / "t.csv").write_text("\n".join(["path,label" + split(0).replace("train", "split"), *lines]))
        dataset = f"csv:{root / 't.csv'}"
    source = DataConfig(dataset)
    info = load_data(dataset).info
    (tmp_path / "link").symlink_to(root)
    write(tmp_path / "elsewhere")
    below = root / "train" if form == "parts" else root
    seen = {"flat": (24, 24), "parts": (16, 24), "table": (24, 24), "table of splits": (16, 24)}[form]

    def said(given: Path | str) -> str:
        messages = [message for message in told(caplog, given, source, info) if "no test" in message]
        assert len(messages) < 2
        return messages[0].partition(" are ")[0] if messages else ""

    assert said(dataset) == said(tmp_path / "elsewhere") == ""
    assert said(root) == said(tmp_path / "link") == "{} of {} images".format(*seen)
    assert said(below / "cat") == {"parts": "4 of 4 images", "table of splits": "8 of 12 images"}.get(
        form, "12 of 12 images"
    )
    if form == "parts":
        assert said(root / "valid") == "8 of 8 images" and said(root / "test") == ""
        assert said(f"imagefolder:{root / 'train'}") == said(f"imagefolder:{root / 'valid'}") == "2 of 2 images"
    if form == "flat":
        (tmp_path / "new.csv").write_text("path\nimg/dog/3.png\nelsewhere/dog/3.png\n")
        assert said(f"csv:{tmp_path / 'new.csv'}") == "1 of 2 images"


@pytest.mark.parametrize("damage", ["gone", "no table", "no path", "two parts"])
def test_a_run_whose_own_data_are_damaged_predicts(tmp_path, damage: str) -> None:
    (tmp_path / "t.csv").write_text({"no table": '"', "no path": "path,label\n\0,a"}.get(damage, "path,label\nx,a"))
    for name in ("train", "test", "val", "valid"):
        write(tmp_path / "img" / name)
    dataset = {"gone": f"csv:{tmp_path / 'none.csv'}", "two parts": f"imagefolder:{tmp_path / 'img'}"}
    source = DataConfig(dataset.get(damage, f"csv:{tmp_path / 't.csv'}"))
    assert learned_from([tmp_path / "img" / "train" / "cat" / "0.png"], source) == []

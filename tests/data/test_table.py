"""Tables of image files, also those that somebody else made."""

import os

import numpy as np
import pytest
from helpers import pixels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pyro_isingvit.core.errors import UserError
from pyro_isingvit.core.settings import DataConfig
from pyro_isingvit.data.inputs import load_inputs
from pyro_isingvit.data.load import load_data
from pyro_isingvit.data.table import csv_table, files_of, read_table

COUNT = 24


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "study"
    (place / "scans").mkdir(parents=True)
    for i in range(COUNT):
        Image.fromarray(pixels(6, 5, seed=i)).save(place / "scans" / f"p{i // 3}_{i}.png")
    return place


def lines(folder, *columns, header="path,label", separator=","):
    """Every image with its class, and further columns."""
    rows = []
    for i in range(COUNT):
        row = [f"scans/p{i // 3}_{i}.png", "sick" if i % 3 == 0 else "well", *(str(column(i)) for column in columns)]
        rows.append(separator.join(row))
    (folder / "table.csv").write_text("\n".join([header, *rows]))
    return f"csv:{folder / 'table.csv'}"


def test_path_and_label_are_enough(folder):
    data = load_data(lines(folder))
    assert data.info.classes == ("sick", "well") and data.info.image_shape == (1, 6, 5)
    assert (len(data.train), len(data.val), len(data.test)) == (17, 2, 5)
    row = data.train.names.index("scans/p7_21.png") if "scans/p7_21.png" in data.train.names else 0
    number = int(data.train.names[row].rpartition("_")[2][:-4])
    assert np.array_equal(data.train.images[row][0].numpy(), pixels(6, 5, seed=number))
    assert int(data.train.labels[row]) == (number % 3 != 0)


def test_all_columns_under_other_names(folder):
    split = lambda i: "Training" if i < 15 else "valid" if i < 18 else "TEST"  # noqa: E731
    spec = lines(
        folder, split, lambda i: f"p{i // 3}", lambda i: 1 + i, header="file;finding;set;patient;trust", separator=";"
    )
    columns = "path=file,label=finding,split=set,group=patient,weight=trust"
    data = load_data(spec, columns=columns)
    assert (len(data.train), len(data.val), len(data.test)) == (15, 3, 6)
    assert set(data.train.groups) == {f"p{i}" for i in range(5)}
    assert (8 * data.train.weights).tolist() == pytest.approx(list(range(1, 16)))  # the mean of training images is 1


def test_predicting_a_table(folder, caplog):
    """All of its images, or those for testing; labels are not needed."""
    data = load_data(lines(folder))
    inputs = load_inputs(lines(folder), data.info)
    assert len(inputs) == COUNT and inputs.labels.bincount().tolist() == [8, 16]
    assert inputs.names[4] == "scans/p1_4.png"
    assert np.array_equal(inputs.images[4][0].numpy(), pixels(6, 5, seed=4))
    own, _ = data.source
    assert len(load_inputs(lines(folder), data.info, source=own)) == 5  # what the run learned from is left out
    again = f"csv:{folder}/../{folder.name}/table.csv"
    assert len(load_inputs(again, data.info, source=own)) == 5 and again != own.dataset
    split = lines(folder, lambda i: "test" if i > 20 else "train", header="path,label,split")
    assert load_inputs(split, data.info).names == tuple(f"scans/p7_{i}.png" for i in (21, 22, 23))
    spec = lines(folder, header="picture,finding")
    for columns in ("path=picture", "path=picture,label=finding,group=patient"):
        found = load_inputs(spec, data.info, source=DataConfig(columns=columns))
        assert found.labels.tolist() == ([-1] * COUNT if columns == "path=picture" else inputs.labels.tolist())
    other = (folder / "table.csv").read_text().replace("sick", "unsure")
    (folder / "table.csv").write_text(other)
    assert "not known" not in caplog.text
    assert set(load_inputs(spec, data.info, source=DataConfig(columns=columns)).labels.tolist()) == {-1}
    assert "8 of 24 are not known" in caplog.text or "16 of 24 are not known" in caplog.text
    with pytest.raises(UserError, match="has no column 'path'"):
        load_inputs(spec, data.info)
    with pytest.raises(UserError, match="no line whose split is test"):
        load_inputs(lines(folder, lambda i: "train", header="path,label,split"), data.info)


def test_numbers_are_sorted_as_numbers(folder):
    spec = lines(folder)
    text = (folder / "table.csv").read_text().replace("sick", "10").replace("well", "9")
    (folder / "table.csv").write_text("\ufeff" + text.replace(",", "\t"))  # tabs and a byte order mark
    assert load_data(spec).info.classes == ("9", "10")


BAD = {
    "no column": ("path,diagnosis\na,b", "has no column 'label'; it has: path, diagnosis"),
    "no lines": ("path,label\n", "has no lines below"),
    "two columns": ("path,label,label.1,label\na,b,c,d", None),
    "no label": ("path,label\nscans/p0_0.png,sick\nscans/p0_1.png,", "line 3: label '' has no label"),
    "no path": ("path,label\n,sick", "line 2: path '' is no path"),
    "absent": ("path,label\nscans/none.png,sick", r"line 2: path 'scans/none.png': there is no such file"),
    "folder": ("path,label\nscans,sick", "there is no such file"),
    "above": ("path,label\n../secret.png,sick", r"line 2: path '../secret.png' lies outside"),
    "absolute": ("path,label\n/etc/passwd,sick", r"line 2: path '/etc/passwd' lies outside"),
    "link": ("path,label\nscans/link.png,sick", "lies outside"),
    "below a link": ("path,label\nup/secret.png,sick", "lies outside"),
    "split": ("path,label,split\nscans/p0_0.png,sick,train\nscans/p0_1.png,well,tset", "line 3: split 'tset' is"),
    "weight": ("path,label,weight\nscans/p0_0.png,sick,1\nscans/p0_1.png,well,-2", "line 3: weight '-2' is no"),
    "group": ("path,label,group\nscans/p0_0.png,sick,", "line 2: group '' has no group"),
    "only test": ("path,label,split\nscans/p0_0.png,sick,test", "no line whose split is train"),
    "class in test": (
        "path,label,split\nscans/p0_0.png,sick,test\nscans/p0_1.png,well,train", "class 'sick' has no training image",
    ),
    "one class": ("path,label\nscans/p0_0.png,sick\nscans/p0_1.png,sick", "only the class 'sick'"),
    "control characters": ("path,label\n\x1b[31mred.png,sick", r"path '\\x1b\[31mred.png'"),
    "no text": (b"path,label\n\xff\xfe\xfa", "cannot read .* as a table in UTF-8"),
    "too many fields": ("path,label\na,b,c,d", "cannot read .* as a table|has no column|no such file"),
    "leak": (
        "path,label,split,group\n" + "\n".join(
            f"scans/p{i // 3}_{i}.png,{'sick' if i % 2 else 'well'},{'train' if i < 14 else 'test'},p{i // 3}"
            for i in range(COUNT)
        ),
        "group 'p4' has images in two parts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_named_by_line(name, folder, tmp_path):
    text, message = BAD[name]
    Image.new("L", (5, 6)).save(tmp_path / "secret.png")
    (folder / "scans" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "table.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message) as caught:
        load_data(f"csv:{folder / 'table.csv'}")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("columns", ["path", "picture=file", "path=", "=file"])
def test_columns_that_are_none(columns, folder):
    with pytest.raises(UserError, match="`columns` must be like"):
        load_data(lines(folder), columns=columns)


def test_formulas_are_text(folder):
    spec = lines(folder)
    text = (folder / "table.csv").read_text().replace("sick", '"=HYPERLINK(""http://x"")"').replace("well", "@SUM(A1)")
    (folder / "table.csv").write_text(text)
    assert load_data(spec).info.classes == ('=HYPERLINK("http://x")', "@SUM(A1)")


def test_a_million_lines(folder):
    """The checks of paths and labels, without decoding a million images."""
    (folder / "table.csv").write_text("path,label\n" + "scans/p0_0.png,sick\nscans/p0_1.png,well\n" * 500_000)
    table = read_table(folder / "table.csv")
    assert len(table) == 10**6
    assert len(files_of(table["path"][:20_000], folder / "table.csv")) == 20_000


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=400) | st.text(max_size=200).map(lambda text: ("path,label,split\n" + text).encode()))
def test_any_bytes_give_a_table_or_one_clear_line(folder, raw):
    (folder / "table.csv").write_bytes(raw)
    try:
        csv_table(DataConfig(dataset=f"csv:{folder / 'table.csv'}"))
    except UserError as error:
        assert "table.csv" in str(error) and len(str(error).splitlines()) == 1
    assert sorted(os.listdir(folder)) == ["scans", "table.csv"]


def test_a_space_makes_no_other_patient(folder):
    spec = lines(folder, lambda i: f"p{i // 3}" + " " * (i % 2), header="path,label,group")
    data = load_data(spec)
    parts = [set(part.groups) for part in (data.train, data.val, data.test)]
    assert set.union(*parts) == {f"p{i}" for i in range(8)} and sum(map(len, parts)) == 8


def test_what_would_be_lost_is_refused(folder):
    spec = lines(folder, lambda i: "left", header="path,label")  # a comma that was not quoted
    with pytest.raises(UserError, match=r"line 2 has 3 fields, and there are 2 columns; quote"):
        load_data(spec)
    spec = lines(folder, lambda i: "", header="path,label")  # a comma at the end of each line
    assert load_data(spec).info.classes == ("sick", "well")
    spec = lines(folder, lambda i: "cat", lambda i: "dog", header="path,label,finding,label")
    with pytest.raises(UserError, match="has 2 columns 'label'; keep one"):
        load_data(spec)


@pytest.mark.parametrize("columns", ["label=path", "label=kind,group=kind", "path=label"])
def test_a_column_is_named_once(columns, folder):
    with pytest.raises(UserError, match=r"takes column '(path|kind|label)' twice"):
        load_data(lines(folder, lambda i: i % 2, header="path,label,kind"), columns=columns)


def test_a_known_name_may_mean_something_else(folder):
    """A table whose classes stand in a column that is called group."""
    data = load_data(lines(folder, lambda i: "ab"[i % 2], header="path,other,group"), columns="label=group")
    assert data.info.classes == ("a", "b") and not data.train.groups


def test_line_numbers_count_breaks_within_quotes(folder):
    spec = lines(folder, lambda i: f'"note {i}\nmore"', header="path,label,note")
    table = read_table(folder / "table.csv")
    assert table.index.tolist() == [2 + 2 * i for i in range(COUNT)]
    text = (folder / "table.csv").read_text().replace("p2_8.png", "gone.png")
    (folder / "table.csv").write_text(text)
    with pytest.raises(UserError, match=r"line 18: path 'scans/gone.png': there is no such file"):
        load_data(spec)
    (folder / "table.csv").write_text(text + '\nscans/p0_0.png,"sick')
    with pytest.raises(UserError, match=r"cannot read .* as a table"):
        load_data(spec)


@pytest.mark.parametrize("cell", ['"a" ', '5" tall', '"5"" tall"', "x" * 200_000])
def test_fields_that_spreadsheets_write(cell, folder):
    assert load_data(lines(folder, lambda i: cell, header="path,label,note")).info.classes == ("sick", "well")


@pytest.mark.parametrize("text", ["", "\n", '"path,label\n', 'path,label\nscans/p0_0.png,"sick\nscans/p0_1.png,well'])
def test_no_table_at_all(text, folder):
    (folder / "table.csv").write_text(text)
    with pytest.raises(UserError, match="cannot read .* as a table"):  # noqa: RUF043
        load_data(f"csv:{folder / 'table.csv'}")


def test_one_image_with_two_labels_is_refused(folder):
    spec = lines(folder)
    table = folder / "table.csv"
    table.write_text(table.read_text() + "\nscans/p0_1.png,well")
    assert len(load_data(spec).info.classes) == 2  # the same label again
    table.write_text(table.read_text() + "\nscans/./p0_1.png,sick")
    with pytest.raises(UserError, match=r"line 3: path 'scans/p0_1\.png' is there again with another label.*2 more"):
        load_data(spec)

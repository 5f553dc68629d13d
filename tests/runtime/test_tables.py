# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import gzip
import re

import pytest

from sparsepath_vit.runtime.tables import read_table

PLAIN = "name,label,width\na.svs,tumour,10\nb.svs,benign,20\n"
EXPECTED = [{"name": "a.svs", "label": "tumour", "width": "10"}, {"name": "b.svs", "label": "benign", "width": "20"}]


def rows_of(path):
    return [row.cells for row in read_table(path, ["name"], ["label", "width"]).rows]


@pytest.mark.parametrize(
    "content",
    {
        "plain": PLAIN.encode(),
        "byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
        "UTF-16, as spreadsheets save Unicode": PLAIN.replace(",", "\t").encode("utf-16"),
        "spaces": PLAIN.replace(",", " , ").encode(),
        "capitals": PLAIN.replace("name,label", "Name,LABEL").encode(),
        "quotes": b'"name", "label", "width"\n"a.svs", "tumour", "10"\n"b.svs", "benign", "20"\n',
        "semicolons": PLAIN.replace(",", ";").encode(),
        "tabs": PLAIN.replace(",", "\t").encode(),
        "line ends of Windows": PLAIN.replace("\n", "\r\n").encode(),
        "line ends of old Macs": PLAIN.replace("\n", "\r").encode(),
        "empty rows and columns": b"\nname,label,width,,\n,,,,\na.svs,tumour,10,,\n\n  \nb.svs,benign,20\n,,\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_tables_as_people_write_them_are_one_table(tmp_path, content):
    (tmp_path / "table.csv").write_bytes(content[1])
    assert rows_of(tmp_path / "table.csv") == EXPECTED
    with gzip.open(tmp_path / "table.csv.gz", "wb") as file:
        file.write(content[1])
    assert rows_of(tmp_path / "table.csv.gz") == EXPECTED


def test_lines_are_counted_and_missing_cells_are_empty(tmp_path):
    (tmp_path / "table.csv").write_text('name,note,label\n\na.svs\nb.svs,"two\nlines",x\n')
    table = read_table(tmp_path / "table.csv", ["name"], ["label"])
    assert table.columns == ("name", "note", "label")
    assert [tuple(row) for row in table.rows] == [
        (3, {"name": "a.svs", "note": "", "label": ""}),
        (5, {"name": "b.svs", "note": "two\nlines", "label": "x"}),
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name,label\na,tumour, high grade\n", r"line 2: the row has 3 cells, the header 2 columns; 'high grade'"),
        (b"name,lable\na,x\n", r"Did you mean 'label' by 'lable'\?"),
        (b"nam,label\na,x\n", r"there is no column 'name'\. Did you mean 'name' by 'nam'\?"),
        (b"path,x\na,1\n", r"has the columns \['path', 'x'\]: expected name .*there is no column 'name'\.$"),
        (b"", r"has the columns \[\]"),
        (b"name,label,Label\na,x,y\n", "the column 'label' more than once"),
        (b"name,,label\na,stray,y\n", "line 2: 'stray' stands in a column without a name"),
        (b"name;width\na;0,5\n", r"line 2: '0,5' is a number with a decimal comma.* no column 'name'.*such as 0\.5"),
        (b'name,label\na,"x\nb,y\n', "cannot be read as a table: line 3: unexpected end of data"),
        (b'name,label\na,"x" y\n', "cannot be read as a table: line 2"),
        (b"name,label\na,\xe4\n", "cannot be read as text .*save it as CSV in UTF-8"),
        (b"name\0,label\na,x\n", "zero bytes"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=words) as raised:
        rows_of(tmp_path / "table.csv")
    assert str(tmp_path / "table.csv") in str(raised.value)


def test_other_columns_are_no_misspelt_ones(tmp_path):
    (tmp_path / "table.csv").write_text("name,label,labels,patient,level,id\na,x,1,2,3,4\n")
    (row,) = rows_of(tmp_path / "table.csv")
    assert row["label"] == "x" and row["labels"] == "1"


def test_names_of_others_stand_for_a_column_that_is_not_there_itself(tmp_path):
    aliases = {"wsi": "name", "slide_id": "name"}
    for header, expected in (("WSI,label", "a"), ("label,slide-id", "x"), ("wsi,name", "x"), ("wsi,slide_id", "a")):
        (tmp_path / "table.csv").write_text(f"{header}\na,x\n")
        (row,) = read_table(tmp_path / "table.csv", ("name",), ("label",), aliases).rows
        assert row.cells["name"] == expected, header
    with pytest.raises(ValueError, match="no column 'name'"):
        read_table(tmp_path / "table.csv", ("name",))


def test_missing_and_damaged_files_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=rf"none\.csv .* does not exist \(working directory {re.escape(str(tmp_path))}"
    ):
        rows_of("none.csv")
    with pytest.raises(ValueError, match="cannot be read"):
        rows_of(tmp_path)
    whole = gzip.compress(PLAIN.encode())
    for content in (b"no gzip", whole[:-12], whole[:12] + b"\xff\xff\xff" + whole[15:]):
        (tmp_path / "table.csv.gz").write_bytes(content)
        with pytest.raises(ValueError, match=r"table\.csv\.gz cannot be read"):
            rows_of(tmp_path / "table.csv.gz")

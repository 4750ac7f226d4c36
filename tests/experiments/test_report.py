"""Reports: the HTML stands by itself and holds all that was given; the text table lines up."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from experiments.report import format_table, write_report
from rbf_jax import plots

VOID = {"meta", "img", "br", "hr", "link"}
TABLE = [
    {"attack": "none", "RBF-CNN": "92.5 % [90.7, 94.0]", "paper": 99.3, "note": 'a < b & "c" | d'},
    {"attack": "PGD <script>alert(1)</script>", "RBF-CNN": "6.1 % [4.8, 7.8]", "paper": None, "note": "two\nlines"},
]


class Page(HTMLParser):
    """Collects the cells, the headings and paragraphs, the images; checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.texts, self.images, self.attributes = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        elif self.open and data.strip():
            self.texts.append((self.open[-1], data))


@pytest.fixture
def figure():
    return plots.image_rows({"original": np.zeros((2, 8, 8, 1), np.float32)})


@pytest.fixture
def text(figure, tmp_path):
    path = tmp_path / "runs" / "report.html"
    sections = [
        ("Images & more", "First.\n\nSecond: x < y.", figure, 'two "black" images'),
        ("Again", "", figure, "as above"),
    ]
    write_report(path, title="RBF-CNN <smoke>", summary="Robust & slow.", table=TABLE, sections=sections)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_holds_every_text(text):
    page = Page(text)
    assert page.rows == [
        ["attack", "RBF-CNN", "paper", "note"],
        ["none", "92.5 % [90.7, 94.0]", "99.3", 'a < b & "c" | d'],
        ["PGD <script>alert(1)</script>", "6.1 % [4.8, 7.8]", "–", "two\nlines"],
    ]
    for expected in [
        ("title", "RBF-CNN <smoke>"),
        ("h1", "RBF-CNN <smoke>"),
        ("p", "Robust & slow."),
        ("h2", "Images & more"),
        ("p", "First."),
        ("p", "Second: x < y."),
        ("h2", "Again"),
    ]:
        assert expected in page.texts


def test_the_page_stands_by_itself(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "a", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_images_are_png_with_a_description(text, figure):
    images = Page(text).images
    assert [image["alt"] for image in images] == ['two "black" images', "as above"]
    for image in images:
        picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2], validate=True)))
        picture.load()
        assert picture.format == "PNG"
        assert picture.size[0] > int(image["width"])  # sharp on a dense screen
        assert int(image["width"]) == pytest.approx(96 * figure.get_figwidth(), abs=1)


def test_a_refused_report_leaves_the_old_one(figure, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    for change, match in [
        ({"table": []}, "at least one row"),
        ({"table": [{"a": 1}, {"b": 2}]}, r"columns \['a'\], got \['b'\]"),
        ({"sections": [("Images", "text", figure, " ")]}, "section 'Images' needs a description"),
    ]:
        arguments = {"title": "t", "summary": "s", "table": [{"a": 1}], "sections": []} | change
        with pytest.raises(ValueError, match=match):
            write_report(path, **arguments)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_text_table_lines_up():
    lines = format_table(["attack", "paper", "note"], [{k: r[k] for k in ("note", "paper", "attack")} for r in TABLE])
    assert lines.splitlines() == [
        "| attack                        | paper | note             |",
        "| ----------------------------- | ----: | ---------------- |",
        r'| none                          |  99.3 | a < b & "c" \| d |',
        "| PGD <script>alert(1)</script> |     – | two lines        |",
    ]


def test_floats_are_short_and_other_values_as_they_are():
    row = {"a": 1 / 3, "b": np.float32(0.1), "c": 12345678, "d": True, "e": ""}
    cells = [cell.strip() for cell in format_table(list(row), [row]).splitlines()[2].strip("|").split("|")]
    assert cells == ["0.3333", "0.1", "12345678", "True", ""]
    assert format_table(["a"], []).splitlines() == ["| a   |", "| --- |"]


@pytest.mark.parametrize(("columns", "row"), [([], {}), (["a"], {}), (["a"], {"a": 1, "b": 2})])
def test_a_table_refuses_rows_of_other_columns(columns, row):
    with pytest.raises(ValueError, match="column"):
        format_table(columns, [row])

"""Reports: the HTML stands by itself and holds all that was given; the text table lines up."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
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


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
QUIET = ("background-networking", "component-update", "sync", "gpu")
# What a browser makes of the page, written where --dump-dom shows it.
LOOK = """<pre id="look"></pre><script>
onload = () => {
  const images = [...document.images].map(image => image.naturalWidth), page = document.documentElement;
  const wide = [...document.querySelectorAll(".wide")].map(box => box.scrollWidth > box.clientWidth);
  const lost = [...document.links].filter(link => !document.querySelector(link.hash)).length;
  const found = {images, wide, lost, slides: page.scrollWidth > page.clientWidth};
  document.getElementById("look").textContent = JSON.stringify(found);
};
</script>"""


class Page(HTMLParser):
    """Collects the cells, the headings and paragraphs, the images; checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.rows, self.texts, self.images, self.attributes = [], [], [], [], [], []
        self.links, self.anchors = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.anchors += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name == "href"]
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
    tables = [("Accuracy <1>", "All of it.", TABLE), ("Models", "", [{"model": "rCNN", "epochs": 50}])]
    write_report(path, title="RBF-CNN <smoke>", summary="Robust & slow.", tables=tables, sections=sections)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_holds_every_text(text):
    page = Page(text)
    assert page.rows == [
        ["attack", "RBF-CNN", "paper", "note"],
        ["none", "92.5 % [90.7, 94.0]", "99.3", 'a < b & "c" | d'],
        ["PGD <script>alert(1)</script>", "6.1 % [4.8, 7.8]", "–", "two\nlines"],
        ["model", "epochs"],
        ["rCNN", "50"],
    ]
    for expected in [
        ("title", "RBF-CNN <smoke>"),
        ("h1", "RBF-CNN <smoke>"),
        ("p", "Robust & slow."),
        ("h2", "Accuracy <1>"),
        ("p", "All of it."),
        ("h2", "Models"),
        ("h2", "Images & more"),
        ("p", "First."),
        ("p", "Second: x < y."),
        ("h2", "Again"),
    ]:
        assert expected in page.texts


def test_the_page_stands_by_itself(text):
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"https?://|@import|url\(", text)
    assert all(value.startswith("data:image/png;base64,") for name, value in page.attributes if name in ("src", "href"))
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in text


def test_a_long_page_lists_its_sections(figure, tmp_path, text):
    assert not {"nav", "a"} & set(Page(text).tags)  # four sections
    headings = ["Accuracy <1>", "Models", "B & c", "D", "E"]
    tables = [(heading, "", TABLE) for heading in headings[:2]]
    sections = [(heading, "", figure, "black") for heading in headings[2:]]
    write_report(tmp_path / "report.html", title="t", summary="", tables=tables, sections=sections)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [text for tag, text in page.texts if tag == "h2"] == headings
    assert [text for tag, text in page.texts if tag == "a"] == headings
    assert page.links == [f"#{anchor}" for anchor in page.anchors]
    assert len(set(page.anchors)) == 5


@pytest.mark.skipif(not CHROMIUM, reason="no chromium or google-chrome here to open the report in")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_the_page(figure, tmp_path, width):
    rows = [{"attack": "PGD"} | {f"model {i}": "92.5 (90.7-94.0)" for i in range(30)}]
    tables = [("All", "", rows), *((f"Table {i}", "", TABLE) for i in range(3))]
    sections = [("Images", "", figure, "black"), ("Again", "", plots.curves({"l2": {"a": ([1], [2])}}, "x", "y"), "a")]
    path = tmp_path / "report.html"
    write_report(path, title="RBF-CNN", summary="Robust & slow.", tables=tables, sections=sections)
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", f"{LOOK}</body>"), encoding="utf-8")
    options = [
        *(f"--disable-{name}" for name in QUIET),
        "--no-sandbox",
        "--no-first-run",
        f"--user-data-dir={tmp_path}",
    ]
    options += ["--headless", "--enable-logging=stderr", "--v=0", f"--window-size={width},900", "--dump-dom"]
    shown = subprocess.run([CHROMIUM, *options, path.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    assert ":CONSOLE" not in shown.stderr
    (found,) = re.findall(r'<pre id="look">(.+)</pre>', shown.stdout)
    found = json.loads(html.unescape(found))
    assert len(found["images"]) == 2
    assert all(found["images"])
    assert found["wide"][0]  # the wide table scrolls in its own box
    assert not found["slides"]  # and so the page does not
    assert found["lost"] == 0


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
        ({"tables": [("All", "", [])]}, "section 'All' must have at least one row"),
        ({"tables": [("All", "", [{"a": 1}, {"b": 2}])]}, r"columns \['a'\], got \['b'\]"),
        ({"sections": [("Images", "text", figure, " ")]}, "section 'Images' needs a description"),
    ]:
        arguments = {"title": "t", "summary": "s", "tables": [("All", "", [{"a": 1}])], "sections": []} | change
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

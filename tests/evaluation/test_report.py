"""A report is one page that loads nothing, escapes everything, and is the same every time."""

import base64
import re
from html.parser import HTMLParser

import pytest

from prosocial_ext.evaluation.report import Report, figure_style

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'single' <img src=x onerror=alert(1)>"


def a_figure():
    from matplotlib.figure import Figure

    with figure_style():
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([0, 1], [1, 0], label="a < b")
    return figure


def a_report():
    report = Report("Title " + HOSTILE, HOSTILE)
    for title in ("Rates", "Rates", HOSTILE):
        report.heading(title)
        report.heading(title, level=3)
    report.paragraph(HOSTILE)
    report.paragraph(HOSTILE, soft=True)
    report.code(HOSTILE)
    report.tiles([(HOSTILE, HOSTILE, HOSTILE)])
    report.table([HOSTILE, "holds"], [[HOSTILE, True], [1.5, False]], caption=HOSTILE, marked=[1])
    report.figure(a_figure(), HOSTILE, HOSTILE)
    return report


class Tags(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self):
        super().__init__()
        self.names, self.attributes, self.text, self.open = set(), [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(page):
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    return tags


def test_whatever_a_text_holds_is_shown_as_it_is_and_runs_nowhere():
    tags = read(a_report().html())
    assert "script" not in tags.names
    assert not any(name.startswith("on") for name, _ in tags.attributes)
    assert sum(HOSTILE in text for text in tags.text) >= 9


def test_nothing_is_loaded_from_outside():
    tags = read(a_report().html())
    sources = [value for name, value in tags.attributes if name in ("src", "href")]
    assert sources
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert "link" not in tags.names


def test_the_contents_lead_to_every_section():
    page = a_report().html()
    tags = read(page)
    anchors = [value for name, value in tags.attributes if name == "href"]
    ids = [value for name, value in tags.attributes if name == "id"]
    assert [f"#{value}" for value in ids] == anchors
    assert len(set(ids)) == 3  # two sections of one title as well


def test_the_same_calls_give_the_same_page():
    assert a_report().html() == a_report().html()


def test_a_figure_is_an_svg_of_its_own():
    report = Report("t")
    report.figure(a_figure(), "caption", "alternative")
    drawn = re.search(r"base64,([^\"]+)", report.html())
    assert base64.b64decode(drawn[1]).decode().lstrip().startswith("<?xml")


def test_flags_are_worded():
    report = Report("t")
    report.table(["claim", "verdict"], [["a", True], ["b", False]])
    assert ">holds<" in report.html()
    assert ">does not hold<" in report.html()


def test_a_crooked_row_is_refused():
    with pytest.raises(ValueError, match=r"rows\[1\] must have 2 cells, as the header, got 1"):
        Report("t").table(["a", "b"], [[1, 2], [3]])


def test_other_levels_are_refused():
    with pytest.raises(ValueError, match="level must be 2 or 3, got 1"):
        Report("t").heading("a", level=1)


def test_saving_replaces_the_page_as_a_whole(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("old")
    a_report().save(target)
    assert target.read_text(encoding="utf-8") == a_report().html()
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    target.write_text("old")
    report = a_report()
    monkeypatch.setattr(report, "html", lambda: "\ud800")  # no UTF-8 holds this
    with pytest.raises(UnicodeEncodeError):
        report.save(target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]

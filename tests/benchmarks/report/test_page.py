"""The page as a browser's parser sees it: whole, self-contained, accessible."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from boostdiff.benchmarks.bench import BenchResult
from boostdiff.benchmarks.report.page import GRID_ROWS, html_report
from boostdiff.benchmarks.stats import Estimate

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Collects tags with their attributes and checks that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def inside(source: str, tag: str) -> str:
    """What the page's only element of this name holds."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, flags=re.DOTALL)
    return content


@pytest.fixture(scope="module")
def source(report_folder: Path) -> str:
    return (report_folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source: str) -> Page:
    return Page(source)


def test_it_asks_the_network_for_nothing(page: Page, source: str) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"link", "iframe", "object", "video", "base"}
        assert "srcset" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:"), tag
        assert "href" not in attributes
    assert not re.search(r"url\(|@import", inside(source, "style"))
    assert not page.all("script")
    for image in page.all("img"):
        kind, data = (image["src"] or "").removeprefix("data:image/").split(";base64,")
        if kind == "svg+xml":
            root = ElementTree.fromstring(base64.b64decode(data))  # noqa: S314
            links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert all(link.startswith("#") for link in links)


def test_the_verdict_comes_first(page: Page, result: BenchResult) -> None:
    shown = [name for name, _ in page.tags]
    assert shown.index("h1") < shown.index("p") < shown.index("figure") < shown.index("table")
    assert page.all("p")[0]["class"] == "verdict"
    assert page.text["p"][0] == result.verdict()
    assert page.text["h2"] == ["Images", "Quality", "Without training", "Speed", "Provenance"]


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (None, "gain within noise</td>"),
        (Estimate(value=2.97, low=2.5, high=3.5, coverage=0.95), "297% <span>[250%, 350%]</span>"),
    ],
)
def test_a_share_of_the_guidance_gain_has_an_interval(result: BenchResult, share: Estimate | None, shown: str) -> None:
    quality = result.quality
    assert quality is not None
    rows = [
        replace(row, gain_recovered=share, caption_gain_recovered=share) if row.role == "student" else row
        for row in quality.rows
    ]
    page = html_report(replace(result, quality=replace(quality, rows=rows)))
    # In the table, for both students, of distance and caption score.
    assert page.count(shown) == 4
    # And in the verdict above.
    verdict, _, _ = page.partition("<h2>Images</h2>")
    assert ("is within noise at N = 8" in verdict) == (share is None)
    assert ("297% [250%, 350%]" in verdict) == (share is not None)


def test_every_picture_has_its_own_alternative_text(page: Page, result: BenchResult) -> None:
    texts = [image["alt"] for image in page.all("img")]
    assert all(texts)
    # Two plots; then four sampling variants per prompt, whose texts repeat only because these prompts do.
    assert len(texts) == 2 + 4 * GRID_ROWS
    assert f"student bitfit: {result.prompts[0]}" in texts


def test_every_column_has_a_heading(page: Page) -> None:
    assert len(page.all("table")) == 5
    assert len(page.all("th")) == 5 + 12 + 10 + 7 + 8
    assert {heading["scope"] for heading in page.all("th")} == {"col"}


def test_narrow_screens_scroll_tables_and_not_the_page(page: Page, source: str) -> None:
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in page.all("meta")
    assert source.count('<div class="scroll"') == len(page.all("table"))
    style = inside(source, "style")
    widths = [float(w) for w in re.findall(r"(?:^|[{;])(?:min-)?width:([\d.]+)rem", style)]
    assert all(16 * width < 390 - 32 for width in widths)


def test_names_are_escaped(result: BenchResult) -> None:
    result.skipped["<b>runner"] = "a < b"
    try:
        text = html_report(result)
    finally:
        del result.skipped["<b>runner"]
    assert "<b>runner" not in text
    assert "&lt;b&gt;runner was left out: a &lt; b" in text

"""The report in headless Chromium, where there is one: `apt-get install chromium-driver`, `pip install selenium`."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")
if not shutil.which("chromedriver"):
    pytest.skip("chromedriver is not installed", allow_module_level=True)


@pytest.fixture(scope="module", params=[1280, 390])
def browser(request: pytest.FixtureRequest, report_folder: Path) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    # A window may not be narrower than some 500 pixels; an emulated screen may.
    screen = {"width": request.param, "height": 900, "pixelRatio": 1}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": screen})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get((report_folder / "report.html").as_uri())
        assert driver.execute_script("return innerWidth") == request.param
        yield driver
    finally:
        driver.quit()


def test_the_page_fits_its_window(browser: Any) -> None:
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    # No table is cut off: what a phone has no room for is left out.
    tables = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    )
    assert tables == [0] * 5
    assert "as fast as the two-pass teacher" in browser.find_element("css selector", ".verdict").text


def test_nothing_is_requested_and_nothing_fails(browser: Any) -> None:
    requested = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requested if not name.startswith("data:")] == []
    assert browser.get_log("browser") == []


def test_every_picture_is_there_and_has_words(browser: Any) -> None:
    pictures = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt])")
    assert len(pictures) > 8
    assert all(natural > 0 and shown > 0 and alt for natural, shown, alt in pictures)


def test_what_matters_shows_on_every_screen(browser: Any) -> None:
    shown = browser.execute_script(
        "return [...document.querySelectorAll('th')].filter(e => e.clientWidth).map(e => e.textContent)"
    )
    assert {"ΔFD to the guided teacher", "whole images [75%]", "images/s [75%]", "Δ luminance [95%]"} <= set(shown)
    assert ("p90 ms" in shown) == (browser.execute_script("return innerWidth") == 1280)
    widths = browser.execute_script("return [...document.querySelectorAll('figure img')].map(e => e.clientWidth)")
    assert min(widths) >= 128

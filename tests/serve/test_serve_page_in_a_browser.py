"""The page in headless Chromium: `apt-get install chromium-driver`, `pip install selenium uvicorn`."""

import shutil
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

import uvicorn
from boostdiff.engine.errors import InputError
from boostdiff.serve.api import make_app
from boostdiff.serve.image_model import Description, Drawn, Job
from boostdiff.serve.loading import open_model
from boostdiff.serve.local import LocalBackend
from boostdiff.serve.settings import Limits, ModelSettings
from boostdiff.serve.url_files import UrlFiles
from selenium import webdriver

if not shutil.which("chromedriver"):
    pytest.skip("chromedriver is not installed", allow_module_level=True)


class FewSteps(LocalBackend):
    """A student of a few steps, which refuses others; it draws by a model that takes any."""

    async def describe(self) -> Description:
        return replace(await super().describe(), id="few", samplers=("euler",), steps=4)

    async def stream(self, job: Job, previews: int) -> AsyncGenerator[Drawn, None]:
        if (job.sampler, job.steps) != ("euler", 4):
            raise InputError(f"this few-step student can't make {job.steps} steps of {job.sampler}")
        async for drawn in super().stream(job, previews):
            yield drawn


@contextmanager
def served(models: Mapping[str, LocalBackend]) -> Iterator[str]:
    app = make_app(models, limits=Limits(), files=UrlFiles(None, seconds=60))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://localhost:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(tiny_folder: Path, students: dict[str, Path]) -> Iterator[str]:
    """A server of a student and its teacher, both in torch."""
    settings = ModelSettings(model=str(tiny_folder), device="cpu")
    student = settings.model_copy(update={"student": str(students["lora"])})
    models = {each.description.id: LocalBackend(each) for each in map(open_model, (student, settings))}
    with served(models) as found:
        yield found


@pytest.fixture(params=[1280, 390])
def browser(request: pytest.FixtureRequest, url: str) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    screen = {"width": request.param, "height": 900, "pixelRatio": 1}
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": screen})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(url)
        yield driver
    finally:
        driver.quit()


def wait_for(browser: Any, said: str) -> None:
    """Until the page's message begins so."""
    for _ in range(300):
        if browser.find_element("id", "message").text.startswith(said):
            return
        time.sleep(0.1)
    raise AssertionError(browser.find_element("id", "message").text)


def test_student_and_teacher_beside_each_other(browser: Any, url: str) -> None:
    # By the keyboard alone: the prompt has the focus, and Enter draws.
    browser.switch_to.active_element.send_keys("\n")
    wait_for(browser, "Done")
    captions = [each.text for each in browser.find_elements("css selector", "figcaption")]
    assert ["(student)" in captions[0], "(teacher)" in captions[1]] == [True, True]
    assert ["20 passes" in captions[0], "40 passes" in captions[1]] == [True, True]
    shown = browser.execute_script("return [...document.images].map(i => [i.naturalWidth, i.clientWidth, i.alt])")
    assert [(natural, bool(alt)) for natural, _, alt in shown] == [(16, True)] * 2
    assert min(width for _, width, _ in shown) > 200
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    requested = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert requested
    assert all(name.startswith((url, "data:")) for name in requested)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("browser", [1280], indirect=True)
@pytest.mark.parametrize("beside", [True, False])
def test_a_few_step_student_draws_its_own_steps(browser: Any, tiny_folder: Path, beside: bool) -> None:
    """Alone, and beside a teacher that takes any."""
    teacher = open_model(ModelSettings(model=str(tiny_folder), device="cpu"))
    with served(
        {"few": FewSteps(teacher)} | ({teacher.description.id: LocalBackend(teacher)} if beside else {})
    ) as url:
        browser.get(url)
        browser.switch_to.active_element.send_keys("\n")
        wait_for(browser, "Done")
        captions = [each.text for each in browser.find_elements("css selector", "figcaption")]
        assert ["8 passes" in captions[0], *("40 passes" in each for each in captions[1:])] == [True] * (1 + beside)
        assert browser.find_element("name", "steps").is_enabled() == beside


class Loading(LocalBackend):
    """Says nothing until it is loaded."""

    loaded = False

    async def describe(self) -> Description:
        if not self.loaded:
            raise TimeoutError
        return replace(await super().describe(), id="late")


@pytest.mark.parametrize("browser", [1280], indirect=True)
@pytest.mark.parametrize("beside", [True, False])
def test_a_model_that_loads_is_drawn_by_later(browser: Any, tiny_folder: Path, beside: bool) -> None:
    teacher = open_model(ModelSettings(model=str(tiny_folder), device="cpu"))
    late = Loading(teacher)
    ready = {teacher.description.id: LocalBackend(teacher)} if beside else {}
    with served({"late": late} | ready) as url:
        browser.get(url)
        wait_for(browser, "Not ready yet: late.")
        browser.switch_to.active_element.send_keys("\n")
        wait_for(browser, "Done. Not ready yet: late." if beside else "Not ready yet: late.")
        assert len(browser.find_elements("css selector", "figcaption")) == beside
        late.loaded = True
        browser.execute_script("document.querySelector('#message').textContent = ''")
        browser.find_element("name", "prompt").send_keys("\n")
        wait_for(browser, "Done.")
        captions = [each.text for each in browser.find_elements("css selector", "figcaption")]
        assert ["40 passes" in each for each in captions] == [True] * (1 + beside)


def test_what_is_refused_is_told(browser: Any) -> None:
    browser.find_element("name", "prompt").clear()
    browser.find_element("name", "prompt").send_keys(" \n")
    wait_for(browser, "Error: the prompt is empty")

"""The API over an engine in this process: what Ray's replicas run, but for the batches."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from boostdiff.engine.errors import InputError
from boostdiff.engine.exported import Engine
from boostdiff.engine.model import Model
from PIL import Image

pytest.importorskip("fastapi", reason="the extra dev has it")

from boostdiff.serve.api import ImagesRequest, OverloadedError, make_app
from boostdiff.serve.guard import Traffic
from boostdiff.serve.image_model import Description, Drawn, ImageModel, Job, Picture
from boostdiff.serve.loading import open_model
from boostdiff.serve.local import LocalBackend
from boostdiff.serve.settings import Limits, ModelSettings
from boostdiff.serve.url_files import UrlFiles
from fastapi.testclient import TestClient

URL, LOCAL = "/v1/images/generations", "http://localhost"
LIMITS = Limits(prompt=200, images=4, steps=30, body=2000)


@pytest.fixture(scope="module")
def model(engines: dict[str, Path]) -> ImageModel:
    opened = open_model(ModelSettings(engine=str(engines["lora"]), runner="onnx", device="cpu", name="tiny"))
    opened.check_itself()
    return opened


@pytest.fixture(scope="module")
def teacher(tiny_folder: Path) -> ImageModel:
    return open_model(ModelSettings(model=str(tiny_folder), device="cpu"))


@pytest.fixture
def client(model: ImageModel, teacher: ImageModel, tmp_path: Path) -> Iterator[TestClient]:
    backends = {each.description.id: LocalBackend(each) for each in (model, teacher)}
    app = make_app(backends, limits=LIMITS, files=UrlFiles(tmp_path, seconds=60))
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as opened:
        yield opened


def pixels(content: bytes | str) -> np.ndarray:
    raw = base64.b64decode(content) if isinstance(content, str) else content
    return np.asarray(Image.open(io.BytesIO(raw))).astype(int)


def test_an_image_is_the_engines_own(client: TestClient, engines: dict[str, Path]) -> None:
    asked = {"prompt": "a red cat", "seed": 5, "steps": 3, "n": 2, "sampler": "euler", "size": "16x16", "user": "x"}
    answer = client.post(URL, json=asked | {"model": "tiny"}).json()
    with Engine.load(engines["lora"], runner="onnx", device="cpu") as engine:
        expected = engine(["a red cat"] * 2, steps=3, seed=5, sampler="euler")
    assert [image["seed"] for image in answer["data"]] == [5, 6]
    for image, other in zip(answer["data"], expected, strict=True):
        assert np.abs(pixels(image["b64_json"]) - np.asarray(other)).max() <= 1
        assert (image["passes"], image["size"]) == (3, "16x16")


def test_images_do_not_depend_on_their_batch(model: ImageModel) -> None:
    """What waits is drawn together if it is alike, and is what it would be alone."""
    jobs = [Job(prompt=f"a red cat {i}", seed=9 * i, steps=2 + i % 2) for i in range(11)]
    backend = LocalBackend(model)

    async def together() -> list[Drawn]:
        given_up = asyncio.ensure_future(backend.draw(jobs[0]))
        await asyncio.sleep(0)
        given_up.cancel()
        return await asyncio.gather(*map(backend.draw, jobs))

    images = asyncio.run(together())
    assert [image.batch for image in images] == [6, 5] * 5 + [6]
    for job, image in zip(jobs, images, strict=True):
        (alone,) = model.draw([job])
        assert np.abs(np.asarray(alone.image).astype(int) - pixels(image.png)).max() <= 1
        assert image.seed == job.seed
    assert "4 images drawn alone and together differ by 0/255" in model.description.checked


def test_a_batch_that_fails_is_not_the_end(model: ImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, draw = LocalBackend(model), model.draw

    def fails_at_first(jobs: list[Job]) -> list[Picture]:
        monkeypatch.setattr(model, "draw", draw)
        raise RuntimeError("out of memory")

    async def both() -> list[Any]:
        job = Job(prompt="a", seed=0, steps=1)
        first = await asyncio.gather(backend.draw(job), return_exceptions=True)
        return [*first, await backend.draw(job)]

    monkeypatch.setattr(model, "draw", fails_at_first)
    failed, image = asyncio.run(both())
    assert "out of memory" in str(failed)
    assert image.step == 1


def test_one_faulty_job_fails_alone(model: ImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, draw = LocalBackend(model), model.draw

    def picky(jobs: list[Job]) -> list[Picture]:
        if any(job.seed == 1 for job in jobs):
            raise RuntimeError("not finite")
        return draw(jobs)

    async def three() -> list[Any]:
        jobs = [Job(prompt="a", seed=seed, steps=1) for seed in range(3)]
        return await asyncio.gather(*map(backend.draw, jobs), return_exceptions=True)

    monkeypatch.setattr(model, "draw", picky)
    first, faulty, last = asyncio.run(three())
    assert "not finite" in str(faulty)
    assert (first.seed, last.seed) == (0, 2)


@pytest.mark.parametrize("text", ["prompt", "negative_prompt"])
def test_half_a_character_is_refused(teacher: ImageModel, text: str) -> None:
    """The tokenizer would stumble over it, and so the whole batch."""
    with pytest.raises(InputError, match="holds half a character"):
        teacher.completed(Job(**{"prompt": "a", "seed": 0, text: "a\ud800"}))


def test_the_teacher_makes_two_passes_and_takes_more(client: TestClient) -> None:
    asked = {"model": "tiny-teacher", "prompt": "a red cat", "seed": 1, "steps": 2}
    images = [
        client.post(URL, json=asked | more).json()["data"][0]
        for more in ({}, {"guidance": 3.0}, {"guidance": 7}, {"negative_prompt": "a blue dog"})
    ]
    assert {image["passes"] for image in images} == {4}
    first, same, *others = (image["b64_json"] for image in images)
    assert first == same
    assert first not in others


def test_an_image_as_a_url(client: TestClient, tmp_path: Path) -> None:
    (image,) = client.post(URL, json={"prompt": "a red cat", "steps": 1, "response_format": "url"}).json()["data"]
    assert image["url"].startswith("http://localhost/v1/images/files/")
    assert pixels(client.get(image["url"]).content).shape == (16, 16, 3)
    for other in ("a" * 32 + ".png", "../api.py", "%2e%2e%2fx", "x.png"):
        assert client.get(f"/v1/images/files/{other}").status_code == 404


class FilesAside(UrlFiles):
    """Refuses to be used on an event loop, which a slow disk would stop."""

    def write(self, content: bytes) -> str | None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return super().write(content)

    def read(self, name: str) -> bytes | None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        return super().read(name)


@pytest.mark.parametrize("public", [None, "https://images.example.org/draw"])
def test_files_behind_a_proxy_are_written_beside_the_event_loop(
    teacher: ImageModel, tmp_path: Path, public: str | None
) -> None:
    files = FilesAside(tmp_path, seconds=60)
    app = make_app({"tiny": LocalBackend(teacher)}, limits=LIMITS, files=files, public_url=public)
    client = TestClient(app, base_url="http://localhost:8000")
    asked = {"prompt": "a red cat", "steps": 1, "response_format": "url"}
    (image,) = client.post(URL, json=asked, headers={"x-forwarded-proto": "https"}).json()["data"]
    server, name = image["url"].split("/v1/images/files/")
    assert server == (public or "http://localhost:8000")
    assert pixels(client.get(f"/v1/images/files/{name}").content).shape == (16, 16, 3)


def test_old_files_are_looked_for_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = list[str]()

    def glob(folder: Path, pattern: str) -> list[Path]:
        looked.append(pattern)
        # Another replica has deleted it.
        return [folder / f"{'a' * 32}.png"]

    monkeypatch.setattr(Path, "glob", glob)
    files = UrlFiles(tmp_path, seconds=3600)
    assert None not in [files.write(b"1") for _ in range(3)]
    assert len(looked) == 1


def test_images_as_files_go_away(tmp_path: Path) -> None:
    files = UrlFiles(tmp_path, seconds=0)
    name = files.write(b"1") or ""
    assert files.read(name) is None
    files.write(b"2")
    assert not (tmp_path / name).exists()
    (tmp_path / "gone").mkdir()
    broken = UrlFiles(tmp_path / "gone", seconds=60)
    (tmp_path / "gone").rmdir()
    assert broken.write(b"3") is None


def test_images_in_a_temporary_folder_go_with_the_server(
    model: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    for folder, left in ((None, 0), (tmp_path / "kept", 1)):
        app = make_app({"tiny": LocalBackend(model)}, limits=LIMITS, files=UrlFiles(folder, seconds=60))
        with TestClient(app, base_url="http://localhost") as opened:
            asked = {"prompt": "a red cat", "steps": 1, "response_format": "url"}
            (image,) = opened.post(URL, json=asked).json()["data"]
            assert opened.get(image["url"]).status_code == 200
        assert len(list(tmp_path.rglob("*.png"))) == left
    assert not list((tmp_path / "t").iterdir())


def test_previews_and_the_image_by_events(client: TestClient) -> None:
    asked = {"prompt": "a red cat", "seed": 2, "steps": 6}
    streamed = client.post(URL, json=asked | {"stream": True, "partial_images": 2})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = [dict(line.split(": ", 1) for line in part.split("\n")) for part in streamed.text.strip().split("\n\n")]
    assert [each["event"].rpartition(".")[2] for each in events] == ["partial_image"] * 2 + ["completed"]
    data = [json.loads(each["data"]) for each in events]
    assert [each["step"] for each in data] == [2, 4, 6]
    whole = client.post(URL, json=asked).json()["data"][0]["b64_json"]
    assert data[-1]["b64_json"] == whole
    assert data[0]["b64_json"] != whole
    assert client.post(URL, json=asked | {"stream": True, "guidance": 9}).status_code == 400


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"size": "24x16"}, 400, "the engine can't draw 16x24 pixels: it was exported for 16x16"),
        ({"stream": True, "response_format": "url"}, 400, "a stream answers b64_json"),
        ({"partial_images": 2}, 400, "partial_images is for streams"),
        ({"size": "large"}, 400, "size"),
        ({"size": "0x0"}, 400, "size"),
        ({"negative_prompt": "blurry"}, 400, "this student was distilled with no negative prompt"),
        ({"guidance": 4}, 400, "distilled at guidance 3 and can't give 4"),
        ({"guidance": "high"}, 400, "guidance"),
        ({"steps": 31}, 400, "steps is 31 and may be 30 at most"),
        ({"steps": 0}, 400, "steps"),
        ({"n": 5}, 400, "n is 5 and may be 4 at most"),
        ({"n": 2, "stream": True}, 400, "n is 2 and may be 1 at most"),
        ({"n": True}, 400, "n"),
        ({"sampler": "lms"}, 400, "unknown sampler 'lms'"),
        ({"seed": -1}, 400, "seed"),
        ({"prompt": " "}, 400, "the prompt is empty"),
        ({"prompt": "x" * 201}, 400, "prompt is 201 and may be 200 at most"),
        ({"prompt": 7}, 400, "prompt"),
        ({"style": "vivid"}, 400, "the field style is not known here: leave it out"),
        ({"a <b>": "x"}, 400, "Extra inputs"),
        ({"model": "dall-e-3"}, 404, "no such model"),
        ({"prompt": "x" * 3000}, 413, "more than 2000 bytes"),
    ],
)
def test_what_can_not_be_drawn(
    client: TestClient, tmp_path: Path, asked: dict[str, Any], status: int, said: str
) -> None:
    answer = client.post(URL, json={"prompt": "a red cat"} | asked)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert said in error["message"]
    # No path of the machine, no word of the command line.
    assert not any(word in answer.text for word in (str(tmp_path.parents[1]), "--", "boostdiff"))


def test_bodies_that_are_no_request(client: TestClient) -> None:
    as_json = {"content-type": "application/json"}
    for content in (b"", b"{", b"[]", b"\xff\xfe", b'{"prompt": "\\ud800"}', b"null", b'{"prompt": 1e999}'):
        answer = client.post(URL, content=content, headers=as_json)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"
    # A form of another site may not draw: only JSON counts, which its browser would ask about first.
    assert client.post(URL, content=b'{"prompt": "a cat"}', headers={"content-type": "text/plain"}).status_code == 400
    chunks = (b" " * 500 for _ in range(5))
    assert client.post(URL, content=chunks, headers=as_json).status_code == 413
    assert client.get(URL).status_code == 405
    assert client.get("/docs").status_code == 404


def test_models_health_and_the_page(client: TestClient) -> None:
    first, second = client.get("/v1/models").json()["data"]
    assert (first["id"], first["role"], first["passes_per_step"], first["size"]) == ("tiny", "student", 1, [16, 16])
    assert (second["id"], second["role"], second["passes_per_step"]) == ("tiny-teacher", "teacher", 2)
    assert client.get("/v1/models/tiny").json() == first
    assert client.get("/v1/models/other").status_code == 404
    assert client.head("/health").status_code == 200
    assert "drawn alone and together" in client.get("/health").json()["models"]["tiny"]
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not any(word in page.text for word in ("http://", "https://", "//cdn", "@import"))
    assert "access-control-allow-origin" not in client.get("/", headers={"origin": "http://other"}).headers
    assert client.get("/metrics").status_code == 404


def test_a_few_step_student_lists_its_own_sampling(model: ImageModel) -> None:
    assert model._distilled is not None
    assert model._engine is not None
    few = replace(model._distilled, sampler="euler", steps=4, timestep_spacing="trailing")
    made = ImageModel(
        name="few", model=model._model, runner=model._runner, distilled=few, engine=model._engine, max_batch=None
    )
    assert (made.description.samplers, made.description.steps) == (("euler",), 4)
    made.completed(Job(prompt="a", seed=0, steps=made.description.steps, sampler=made.description.samplers[0]))
    assert model.description.steps is None
    assert len(model.description.samplers) > 1


def test_a_batch_fits_of_the_largest_images(model: ImageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch_of(made: Model) -> int:
        return 64 // made.latent_shape[1]

    monkeypatch.setattr("boostdiff.serve.image_model.default_batch_size", batch_of)
    engine = model._engine
    assert engine is not None
    monkeypatch.setitem(engine.manifest.options, "size", [16, 16, 64])
    made = ImageModel(
        name="x", model=model._model, runner=model._runner, distilled=model._distilled, engine=engine, max_batch=None
    )
    assert made.description.max_batch == batch_of(model._model) // 4


class Slow:
    """A backend that is never done, or has too many waiting, or fails."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def describe(self) -> Description:
        raise self.error

    async def draw(self, job: Job) -> Drawn:
        raise self.error

    async def stream(self, job: Job, previews: int) -> AsyncGenerator[Drawn, None]:
        raise self.error
        yield


@pytest.mark.parametrize(
    ("error", "status"),
    [(OverloadedError(), 503), (TimeoutError(), 503), (InputError("no"), 400), (RuntimeError("in /home/me/x.py"), 500)],
)
def test_failures_are_told_without_their_traceback(tmp_path: Path, error: Exception, status: int) -> None:
    app = make_app({"slow": Slow(error)}, limits=LIMITS, files=UrlFiles(tmp_path, seconds=1))
    client = TestClient(app, base_url="http://localhost", raise_server_exceptions=False)
    for stream in (False, True):
        answer = client.post(URL, json={"prompt": "a", "stream": stream})
        assert answer.status_code == status
        assert ("retry-after" in answer.headers) == (status == 503)
        assert "/home" not in answer.text
    assert client.get("/health").status_code == (503 if status == 503 else status)


class Loading(Slow):
    """A backend that says nothing yet."""

    def __init__(self) -> None:
        """Without an error."""

    async def describe(self) -> Description:
        await asyncio.Event().wait()
        raise AssertionError


def test_a_model_that_loads_is_listed_beside_the_others(
    teacher: ImageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boostdiff.serve.api.DESCRIBE_SECONDS", 0)
    backends = {"lost": Slow(OverloadedError()), "loading": Loading(), "tiny": LocalBackend(teacher)}
    client = TestClient(make_app(backends, limits=Limits(steps=5), files=UrlFiles(tmp_path, seconds=1)), base_url=LOCAL)
    lost, loading, ready = client.get("/v1/models").json()["data"]
    assert [each["ready"] for each in (lost, loading, ready)] == [False, False, True]
    assert loading.keys() == {"id", "object", "created", "owned_by", "ready"}
    assert (loading["id"], ready["role"]) == ("loading", "teacher")
    for answer in (
        client.get("/v1/models/loading"),
        # How many steps it takes is asked first.
        client.post(URL, json={"prompt": "a", "model": "loading"}),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "not_ready")
        assert error["message"] == "the model loading is not ready: try again later"
    assert client.get("/health").status_code == 503


def test_models_are_asked_at_once(tmp_path: Path, teacher: ImageModel) -> None:
    asked = list[str]()

    class Together(LocalBackend):
        async def describe(self) -> Description:
            asked.append("")
            while len(asked) % 2:
                await asyncio.sleep(0)
            return await super().describe()

    backends = {name: Together(teacher) for name in "ab"}
    client = TestClient(make_app(backends, limits=LIMITS, files=UrlFiles(tmp_path, seconds=1)), base_url=LOCAL)
    assert [each["ready"] for each in client.get("/v1/models").json()["data"]] == [True, True]
    assert client.get("/health").status_code == 200


def test_too_many_images_at_once(client: TestClient, model: ImageModel, tmp_path: Path) -> None:
    limits, files = Limits(waiting=2), UrlFiles(tmp_path, seconds=1)
    client = TestClient(make_app({"tiny": LocalBackend(model)}, limits=limits, files=files), base_url=LOCAL)
    # To ask for it again would not help.
    answer = client.post(URL, json={"prompt": "a", "n": 3, "steps": 1})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "n is 3 and may be 2 at most")
    # Places are given back.
    assert [client.post(URL, json={"prompt": "a", "n": 2, "steps": 1}).status_code for _ in range(3)] == [200] * 3


@pytest.mark.parametrize(("own", "limit", "drawn"), [(None, 3, 3), (None, 30, 20), (2, 3, 2), (4, 3, None)])
def test_steps_that_are_left_out_are_limited_too(
    model: ImageModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: int | None, limit: int, drawn: int | None
) -> None:
    """Also of a few-step student, which takes its own number alone."""
    backend = LocalBackend(model)
    monkeypatch.setattr(model, "description", replace(model.description, steps=own))
    if own:
        monkeypatch.setattr(model, "_distilled", replace(model._distilled, steps=own, sampler="ddim"))
    app = make_app({"tiny": backend}, limits=Limits(steps=limit), files=UrlFiles(tmp_path, seconds=1))
    answer = TestClient(app, base_url=LOCAL).post(URL, json={"prompt": "a"})
    if drawn is None:
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "steps is 4 and may be 3 at most")
    else:
        assert answer.json()["data"][0]["step"] == drawn


def test_a_model_is_found_by_a_name_with_slashes(model: ImageModel, tmp_path: Path) -> None:
    app = make_app({"org/tiny": LocalBackend(model)}, limits=LIMITS, files=UrlFiles(tmp_path, seconds=1))
    client = TestClient(app, base_url=LOCAL)
    assert [client.get(f"/v1/models/{name}").status_code for name in ("org/tiny", "org", "tiny")] == [200, 404, 404]


class Observed(Slow):
    """Tells what is ongoing while it draws."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__(InputError("no"))
        self.traffic, self.seen = traffic, 0

    async def draw(self, job: Job) -> Drawn:
        self.seen = self.traffic.ongoing
        return await super().draw(job)


def test_a_server_that_stops_takes_no_further_requests(tmp_path: Path) -> None:
    traffic = Traffic()
    backend = Observed(traffic)
    app = make_app({"slow": backend}, limits=LIMITS, files=UrlFiles(tmp_path, seconds=1), traffic=traffic)
    client = TestClient(app, base_url="http://localhost")
    assert client.post(URL, json={"prompt": "a"}).status_code == 400
    assert (backend.seen, traffic.ongoing) == (1, 0)
    traffic.closed = True
    answer = client.post(URL, json={"prompt": "a"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "stopping"
    assert traffic.ongoing == 0


def guarded(tmp_path: Path, **options: Any) -> Callable[..., int]:
    app = make_app({"slow": Slow(InputError("no"))}, limits=LIMITS, files=UrlFiles(tmp_path, seconds=1), **options)
    client = TestClient(app, base_url="http://localhost")

    def status(path: str = "/v1/models", **headers: str) -> int:
        return client.get(path, headers=headers).status_code

    return status


def test_a_key(tmp_path: Path) -> None:
    status = guarded(tmp_path, key="secret", loopback=False)
    assert status() == 401
    assert status(authorization="Bearer wrong") == 401
    assert status(authorization="secret") == 401
    assert status("/metrics") == 401
    assert status("/") == 200
    # With the key it comes as far as the model.
    assert status(authorization="Bearer secret") == status(authorization="bearer secret") == 400
    assert status(authorization="Basic secret") == status(authorization="Bearer") == 401
    assert status(authorization="Bearer secret", host="example.org") == 400


def test_other_names_of_this_machine_are_refused(tmp_path: Path) -> None:
    status = guarded(tmp_path)
    assert status(host="example.org") == 403
    assert status(host="localhost:8000") == status(host="[::1]:8000") == status(host="127.0.0.1") == 400
    # Every address of the loopback, as `--host` takes it.
    assert status(host="127.0.0.2:8000") == 400
    assert status(host="127.0.0.1.example.org") == status(host="10.0.0.1") == status(host="") == 403


def test_a_seed_is_drawn_where_none_is_asked_for() -> None:
    seeds = {ImagesRequest(prompt="a").jobs()[0].seed for _ in range(5)}
    assert len(seeds) == 5

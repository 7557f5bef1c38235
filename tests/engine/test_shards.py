"""Images as WebDataset shards: what is in them, what a second run does, and what is refused."""

import errno
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from boostdiff.engine.config import GenerateConfig
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.files import locked
from boostdiff.engine.generate import draw, resolve
from boostdiff.engine.model import locate
from boostdiff.engine.shards import Job, draw_shards, prepared
from PIL import Image
from tiny import PROMPTS

TEXTS = [*PROMPTS[:4], "a very " * 30 + "long prompt"]


@pytest.fixture
def job(tiny_folder: Path, tmp_path: Path) -> Callable[..., Job]:
    def make(*, output: str = "shards", shard_size: int = 2, **options: object) -> Job:
        files = locate(str(tiny_folder))
        config = GenerateConfig(prompts=TEXTS, **{"teacher": True, "steps": 2, "seed": 7} | options)
        return Job(
            files=files,
            config=resolve(files, config),
            output=tmp_path / output,
            device="cpu",
            shard_size=shard_size,
        )

    return make


def drawn(job: Job) -> int:
    with prepared(job) as shards:
        return draw_shards(job, shards)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_shards_hold_what_generate_draws(job: Callable[..., Job], tmp_path: Path) -> None:
    made = job()
    assert drawn(made) == 1, "one of the prompts is longer than the text encoder takes"
    assert sorted(path.name for path in made.output.glob("*.tar")) == [f"shard-00000{i}.tar" for i in range(3)]
    found = {name: content for shard in range(3) for name, content in members(made.path(shard)).items()}
    assert len(found) == 3 * len(TEXTS)
    pictures = draw(made.files, made.config, output=tmp_path / "images", device="cpu")
    for index, (text, picture) in enumerate(zip(TEXTS, pictures, strict=True)):
        key = f"{index:09}"
        assert found[f"{key}.txt"].decode() == text
        about = json.loads(found[f"{key}.json"])
        assert (about["prompt"], about["seed"], about["steps"], about["role"]) == (text, 7 + index, 2, "teacher")
        pixels = np.asarray(Image.open(io.BytesIO(found[f"{key}.png"]))).astype(int)
        assert np.abs(pixels - np.asarray(Image.open(picture)).astype(int)).max() <= 1
        assert pixels.std() > 1


@pytest.mark.parametrize("target", ["new", "new/below"])
def test_a_link_to_a_folder_that_is_to_be_made(job: Callable[..., Job], tmp_path: Path, target: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    with prepared(job(output="link")) as shards:
        assert shards == [0, 1, 2]
    assert [path.name for path in (tmp_path / target).iterdir()] == ["job.json"]


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(job: Callable[..., Job]) -> None:
    whole = job(output="whole")
    drawn(whole)
    made = job()

    taken = 0

    def stop(steps: int) -> None:
        nonlocal taken
        taken += steps
        if taken > made.steps_in(0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), prepared(made) as shards:
        draw_shards(made, shards, stop)
    # A killed process can't remove what it was writing.
    (made.output / ".shard-000001.x1.partial").write_bytes(b"half")
    with prepared(made) as shards:
        assert shards == [1, 2]
        draw_shards(made, shards)
    assert not list(made.output.glob(".*partial"))
    for shard in range(3):
        assert made.path(shard).read_bytes() == whole.path(shard).read_bytes()
    with prepared(made) as shards:
        assert shards == []
    # Cut since, as by a lost power or a copy that ended.
    for length in (0, 600, 1500):
        made.path(1).write_bytes(whole.path(1).read_bytes()[:length])
        with prepared(made) as shards:
            assert shards == [1]
    drawn(made)
    assert made.path(1).read_bytes() == whole.path(1).read_bytes()


def test_a_shard_says_all_that_an_image_is_drawn_by(job: Callable[..., Job], engines: dict[str, Path]) -> None:
    made = job(negative_prompt="blurry", guidance=2.0, guider="rescale", guidance_rescale=0.5)
    drawn(made)
    about = json.loads(members(made.path(0))["000000000.json"])
    assert about["negative_prompt"] == "blurry"
    assert (about["guidance"], about["guider"], about["guidance_rescale"]) == (2.0, "rescale", 0.5)


def test_paths_of_a_job_for_other_folders_are_absolute(
    job: Callable[..., Job], engines: dict[str, Path], students: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(students["lora"].parent)
    made = job(teacher=False, runner="onnx", engine=engines["lora"], student=Path("lora")).absolute()
    assert made.config.student == students["lora"].resolve()
    assert made.config.engine == engines["lora"].resolve()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 8}, "(seed)"),
        ({"shard_size": 3}, "(images per shard)"),
        ({"guidance": 2.0, "steps": 3}, "(guidance, steps)"),
        ({"negative_prompt": "blurry"}, "(negative prompt)"),
    ],
)
def test_shards_of_another_job_stay(job: Callable[..., Job], options: dict[str, object], said: str) -> None:
    with prepared(job()):
        pass
    with pytest.raises(InputError) as error, prepared(job(**options)):
        pass
    assert said in str(error.value)


def test_another_text_encoder_or_vae_is_another_job(job: Callable[..., Job], tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    made = replace(job(), files=locate(str(folder)))
    with prepared(made):
        pass
    (changed,) = (folder / "vae").glob("*.safetensors")
    changed.write_bytes(changed.read_bytes() + b"\0")
    with pytest.raises(InputError, match=r"of another job \(weights\)"), prepared(made):
        pass


def test_a_run_that_was_killed_as_it_began_goes_on(job: Callable[..., Job]) -> None:
    made = job()
    made.output.mkdir()
    (made.output / ".job.json.partial").write_text('{"ima')
    with prepared(made) as shards:
        assert shards == [0, 1, 2]
    assert [path.name for path in made.output.iterdir()] == ["job.json"]


def test_a_file_system_without_locks(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing of another process, whose files may be there."""

    def unsupported(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    made = job()
    monkeypatch.setattr("boostdiff.engine.files.fcntl.flock", unsupported)
    made.output.mkdir()
    with locked(made.output, wait=False) as held:
        assert held is None
    with prepared(made) as shards:
        (made.output / ".shard-000001.x1.partial").write_bytes(b"half")
        assert shards == [0, 1, 2]
    assert (made.output / ".shard-000001.x1.partial").exists()


def test_what_can_not_be_written(job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="holds something else"), prepared(job(output="mine")):
        pass
    made = job()
    with prepared(made), pytest.raises(InputError, match="another process"), prepared(made):
        pass
    with locked(made.output, wait=False) as held:
        assert held, "the lock ends with the run"

    def full(*arguments: object, **options: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("boostdiff.engine.shards.png_of", full)
    with prepared(made) as shards, pytest.raises(OSError, match="No space"):
        draw_shards(made, shards)
    assert [path.name for path in made.output.iterdir()] == ["job.json"]


def test_an_image_that_is_not_finite_leaves_no_shard(job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise BoostDiffError("not finite")

    made = job()
    monkeypatch.setattr("boostdiff.engine.shards.images_of", broken)
    with prepared(made), pytest.raises(BoostDiffError, match="not finite"):
        draw_shards(made, [0])
    assert [path.name for path in made.output.iterdir()] == ["job.json"]

"""Shards: what a killed run keeps, what belongs to what, and several processes."""

import copy
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from boostdiff.benchmarks import session as session_module
from boostdiff.benchmarks.quality import features, samples
from boostdiff.benchmarks.quality.features import EfficientNetLite0Features
from boostdiff.benchmarks.quality.samples import SampleCache
from boostdiff.benchmarks.session import Session, identity_of
from boostdiff.benchmarks.speed import fastest
from boostdiff.engine import sampling
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.model import Model
from boostdiff.engine.sampling import generate, to_uint8
from boostdiff.engine.schedulers import SAMPLERS
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from safetensors import safe_open
from tiny import PROMPTS
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 2


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0Features:
    return EfficientNetLite0Features()


@pytest.fixture
def sample_cache(tiny: Model, network: EfficientNetLite0Features, tmp_path: Path) -> SampleCache:
    prompts = [f"{prompt} {i}" for i in range(2) for prompt in PROMPTS]
    return SampleCache(
        model=tiny,
        network=network,
        prompts=prompts,
        seed=5,
        batch_size=3,
        folder=tmp_path / "cache",
        identity=identity_of(tiny),
        shard=3,
    )


def shards(sample_cache: SampleCache) -> set[Path]:
    assert sample_cache.folder is not None
    return set(sample_cache.folder.iterdir()) if sample_cache.folder.is_dir() else set()


def test_a_killed_run_loses_one_shard_at_most(sample_cache: SampleCache) -> None:
    variant = Session(model=sample_cache.model, sampler="ddim", steps=STEPS).teacher(3.0)
    steps_taken: list[int] = []

    def kill(name: str, count: int) -> None:
        steps_taken.append(count)
        # In the middle of the second shard.
        if len(steps_taken) == STEPS + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(sample_cache, on_images=kill).sampled(variant)
    assert len(shards(sample_cache)) == 1
    sampled: list[int] = []
    resumed = replace(sample_cache, on_images=lambda name, count: sampled.append(count)).sampled(variant)
    # The first shard is told of at once, the others step by step.
    assert sampled == [3 * STEPS, 3, 3, 2, 2]
    assert len(shards(sample_cache)) == 3
    straight = replace(sample_cache, folder=None).sampled(variant)
    for name in ("features", "samples"):
        assert torch.equal(getattr(resumed, name), getattr(straight, name)), name
    assert len(resumed.features) == 8


def test_whatever_determines_the_images_names_the_shard(sample_cache: SampleCache) -> None:
    session = Session(model=sample_cache.model, sampler="ddim", steps=STEPS)
    small = replace(sample_cache, prompts=list(PROMPTS[:2]))
    small.sampled(session.teacher(3.0))
    (first,) = shards(sample_cache)
    with safe_open(first, framework="pt") as file:
        assert "denoiser" in file.metadata()["key"]
    small.sampled(session.teacher(3.0))
    assert shards(sample_cache) == {first}
    others = [
        (small, session.teacher(4.0)),
        (small, session.teacher(3.0, reseeded=True)),
        (small, replace(session, sampler="euler").teacher(3.0)),
        (small, replace(session, steps=3).teacher(3.0)),
        (replace(small, seed=6), session.teacher(3.0)),
        (replace(small, prompts=["a red cat", "x"]), session.teacher(3.0)),
        (replace(small, negative_prompt="x"), session.teacher(3.0)),
        (replace(small, identity={"unet": "another"}), session.teacher(3.0)),
    ]
    for count, (other, variant) in enumerate(others, start=2):
        other.sampled(variant)
        assert len(shards(sample_cache)) == count


def test_other_code_draws_again(sample_cache: SampleCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, hashes = tmp_path / "boostdiff", [samples.code_sha256()]
    for path in ("engine/sampling.py", "engine/embedded/__init__.py", "benchmarks/quality/features.py"):
        for content in ("a = 1", "a = 2"):
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            (package / path).write_text(content)
            hashes.append(samples.code_sha256.__wrapped__(package))
    (package / "engine/sampling.py").rename(package / "engine/sampled.py")
    hashes.append(samples.code_sha256.__wrapped__(package))
    assert len(set(hashes)) == len(hashes)
    for path in ("serve/api.py", "engine/embedded/prompts/held_out.txt", "benchmarks/report/page.py"):
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text("other")
    assert samples.code_sha256.__wrapped__(package) == hashes[-1]
    # What is hashed is what this package has; and it is part of a shard's name.
    assert {path for pattern in samples._SOURCES for path in samples._PACKAGE.glob(pattern)} >= {
        Path(module.__file__) for module in (samples, features, sampling, fastest, session_module)
    }
    variant = Session(model=sample_cache.model, sampler="ddim", steps=STEPS).teacher(3.0)
    before = sample_cache._key(variant, 0)
    monkeypatch.setattr(samples, "code_sha256", lambda: "another")
    assert sample_cache._key(variant, 0) == before | {"code": "another"} != before


def test_a_shard_is_held_in_8_bits(sample_cache: SampleCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """As floats 200 images of 1024 pixels are 2.3 GiB, and several copies were made of them."""
    converted: list[int] = []

    def counting(images: torch.Tensor) -> torch.Tensor:
        converted.append(len(images))
        return to_uint8(images)

    monkeypatch.setattr(samples, "to_uint8", counting)
    cache = replace(sample_cache, shard=8, keep=8, folder=None)
    session = Session(model=cache.model, sampler="ddim", steps=STEPS)
    found = cache.sampled(session.teacher(3.0))
    assert converted == [3, 3, 2]
    # The same as of all at once.
    images = to_uint8(
        generate(
            cache.model,
            session.teacher(3.0).open(),
            text=cache.model.family.encode(cache.model.pipeline, cache.prompts),
            make_scheduler=session.make_scheduler,
            steps=STEPS,
            seed=cache.seed,
            batch_size=cache.batch_size,
        )
    )
    assert torch.equal(found.samples, images)
    assert torch.equal(found.features, features.features_of(cache.network, images))
    assert torch.equal(found.colors, samples._colors_of_batch(images))


class LargestFloat(TorchDispatchMode):
    """Counts the numbers of the largest float tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.is_floating_point():
            self.numbers = max(self.numbers, made.numel())
        return made


def test_colors_are_computed_a_few_images_at_a_time() -> None:
    images = torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with LargestFloat() as largest:
        colors = samples.color_statistics(images)
    assert largest.numbers == samples.COLOR_BATCH * 3 * 16 * 16
    assert torch.equal(colors, samples._colors_of_batch(images))


@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", "vae/config.json"])
def test_an_edited_configuration_is_another_model(tiny: Model, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny.files.folder, tmp_path / "copy")
    copy = replace(tiny, files=replace(tiny.files, folder=tmp_path / "copy"))
    assert identity_of(copy) == identity_of(tiny)
    write_json(tmp_path / "copy" / name, read_json(tmp_path / "copy" / name) | {"sample_size": 12})
    assert identity_of(copy) != identity_of(tiny)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_shard_keeps_its_name_in_another_process(sample_cache: SampleCache, sampler: str) -> None:
    # diffusers lists the settings that were left to their defaults in the order of a set of strings.
    variant = Session(model=sample_cache.model, sampler=sampler, steps=STEPS).teacher(3.0)

    def in_another_order() -> SchedulerMixin:
        scheduler = variant.make_scheduler()
        listed = scheduler.config.get("_use_default_values", [])
        scheduler._internal_dict = FrozenDict(scheduler.config | {"_use_default_values": [*listed[::-1], "another"]})
        return scheduler

    assert sample_cache._key(variant, 0) == sample_cache._key(replace(variant, make_scheduler=in_another_order), 0)


def test_a_damaged_shard_is_sampled_again(sample_cache: SampleCache) -> None:
    variant = Session(model=sample_cache.model, sampler="ddim", steps=STEPS).teacher(1.0)
    before = sample_cache.sampled(variant)
    for path, content in zip(sorted(shards(sample_cache)), (b"", b"x" * 30), strict=False):
        path.write_bytes(content)
    assert torch.equal(sample_cache.sampled(variant).features, before.features)


def as_in_another_process(cache: SampleCache, **changes: Any) -> SampleCache:
    """The same with a tokenizer of its own: threads can't share one, which keeps its padding in itself."""
    pipeline = copy.copy(cache.model.pipeline)
    pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)
    return replace(cache, model=replace(cache.model, pipeline=pipeline), **changes)


def test_two_runs_may_share_a_folder(sample_cache: SampleCache) -> None:
    variant = Session(model=sample_cache.model, sampler="ddim", steps=STEPS).teacher(3.0)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda run: run.sampled(variant), [sample_cache, as_in_another_process(sample_cache)])
    assert torch.equal(one.features, other.features)
    assert {path.suffix for path in shards(sample_cache)} == {".safetensors"}
    assert len(shards(sample_cache)) == 3


class Thread:
    """One of several threads in the place of a process that was launched."""

    num_processes = 2

    def __init__(self, index: int, barrier: threading.Barrier) -> None:
        self.index, self.wait_for_everyone = index, barrier.wait

    @contextmanager
    def split_between_processes(self, items: list[Any]) -> Iterator[list[Any]]:
        yield items[self.index :: self.num_processes]

    def destroy_process_group(self) -> None:
        """There is none."""


def test_two_fill_a_cache_together(sample_cache: SampleCache) -> None:
    barrier, counted = threading.Barrier(2), {0: 0, 1: 0}
    session = Session(model=sample_cache.model, sampler="ddim", steps=STEPS)
    variants = [session.teacher(3.0), session.teacher(1.0)]

    def fill(index: int) -> None:
        def count(name: str, images: int) -> None:
            counted[index] += images

        cache = as_in_another_process(sample_cache, shard=2, on_images=count)
        cache.fill(variants, Thread(index, barrier))  # type: ignore[arg-type]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(fill, range(2)))
    # Eight shards of two images at two steps: half by each, which counts for both.
    assert counted == {0: 32, 1: 32}
    assert len(shards(sample_cache)) == 8


WORKER = """
import dataclasses
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from boostdiff.engine import embedded
from boostdiff.benchmarks.quality.features import EfficientNetLite0Features
from boostdiff.benchmarks.quality.reference import Reference
from boostdiff.benchmarks.session import Session
from boostdiff.benchmarks.quality.quality import evaluate
from boostdiff.benchmarks.quality.samples import SampleCache, launched_processes
from boostdiff.engine.model import load, locate

processes = launched_processes(torch.device("cpu"))
model = load(locate(sys.argv[2]), device=torch.device("cpu"))
counted = []
sample_cache = SampleCache(
    model=model, network=EfficientNetLite0Features(), prompts=[f"a {i}" for i in range(8)], seed=5, batch_size=2,
    folder=Path(sys.argv[3]), shard=2, on_images=lambda name, count: counted.append(count),
)
session = Session(model=model, sampler="ddim", steps=2)
rows = [session.teacher(3.0), session.teacher(1.0)]
sample_cache = sample_cache.fill(rows, processes)
Path(sys.argv[3], f"{processes.process_index}.count").write_text(str(sum(counted)))
if processes.is_main_process:
    # The other process is gone: nothing must wait for it.
    sample_cache = dataclasses.replace(sample_cache, reference=Reference.load(embedded.REFERENCE))
    quality = evaluate(sample_cache, rows[:2])
    print(quality.rows[1].distance)
"""


@pytest.mark.slow
def test_two_processes_share_the_shards(
    tiny: Model, network: EfficientNetLite0Features, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    cache = tmp_path / "cache"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(tmp_path / "worker.py", Path(__file__).parents[2], tiny_folder, cache),
        ],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # Eight shards of two images at two steps: half in each process, which counts for both.
    assert sorted(path.read_text() for path in cache.glob("*.count")) == ["32", "32"]
    assert float(done.stdout.split()[-1]) > 0
    assert len(list(cache.glob("*.safetensors"))) == 8
    sample_cache = SampleCache(
        model=tiny, network=network, prompts=[f"a {i}" for i in range(8)], seed=5, batch_size=2, folder=cache, shard=2
    )
    variant = Session(model=tiny, sampler="ddim", steps=2).teacher(3.0)
    together = sample_cache.sampled(variant)
    assert len(list(cache.glob("*.safetensors"))) == 8
    # One thread there, several here: a pixel may round to its neighbor, which other images are far beyond.
    alone = replace(sample_cache, folder=None)
    expected = alone.sampled(variant).features
    unlike = alone.sampled(Session(model=tiny, sampler="ddim", steps=2).teacher(1.0)).features
    difference = (together.features - expected).abs().mean()
    assert difference < 0.02 * (unlike - expected).abs().mean()

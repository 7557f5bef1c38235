"""Shards: what a killed run keeps, what belongs to what, and several processes."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from boostdiff.benchmarks.quality.features import EfficientNetLite0Features
from boostdiff.benchmarks.quality.samples import Campaign
from boostdiff.benchmarks.session import Lineup, identity_of
from boostdiff.engine.files import read_json, write_json
from boostdiff.engine.model import Model
from boostdiff.engine.schedulers import SAMPLERS
from diffusers import SchedulerMixin
from diffusers.configuration_utils import FrozenDict
from safetensors import safe_open
from tiny import PROMPTS

STEPS = 2


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0Features:
    return EfficientNetLite0Features()


@pytest.fixture
def campaign(tiny: Model, network: EfficientNetLite0Features, tmp_path: Path) -> Campaign:
    prompts = [f"{prompt} {i}" for i in range(2) for prompt in PROMPTS]
    return Campaign(
        model=tiny,
        network=network,
        prompts=prompts,
        seed=5,
        batch_size=3,
        cache=tmp_path / "cache",
        identity=identity_of(tiny),
        shard=3,
    )


def shards(campaign: Campaign) -> set[Path]:
    assert campaign.cache is not None
    return set(campaign.cache.iterdir()) if campaign.cache.is_dir() else set()


def test_a_killed_run_loses_one_shard_at_most(campaign: Campaign) -> None:
    contestant = Lineup(model=campaign.model, sampler="ddim", steps=STEPS).teacher(3.0)
    steps_taken: list[int] = []

    def kill(name: str, count: int) -> None:
        steps_taken.append(count)
        # In the middle of the second shard.
        if len(steps_taken) == STEPS + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(campaign, on_images=kill).sampled(contestant)
    assert len(shards(campaign)) == 1
    drawn: list[int] = []
    resumed = replace(campaign, on_images=lambda name, count: drawn.append(count)).sampled(contestant)
    # The first shard is told of at once, the others step by step.
    assert drawn == [3 * STEPS, 3, 3, 2, 2]
    assert len(shards(campaign)) == 3
    straight = replace(campaign, cache=None).sampled(contestant)
    for name in ("features", "samples"):
        assert torch.equal(getattr(resumed, name), getattr(straight, name)), name
    assert len(resumed.features) == 8


def test_whatever_determines_the_images_names_the_shard(campaign: Campaign) -> None:
    lineup = Lineup(model=campaign.model, sampler="ddim", steps=STEPS)
    small = replace(campaign, prompts=list(PROMPTS[:2]))
    small.sampled(lineup.teacher(3.0))
    (first,) = shards(campaign)
    with safe_open(first, framework="pt") as file:
        assert "unet" in file.metadata()["key"]
    small.sampled(lineup.teacher(3.0))
    assert shards(campaign) == {first}
    others = [
        (small, lineup.teacher(4.0)),
        (small, lineup.teacher(3.0, reseeded=True)),
        (small, replace(lineup, sampler="euler").teacher(3.0)),
        (small, replace(lineup, steps=3).teacher(3.0)),
        (replace(small, seed=6), lineup.teacher(3.0)),
        (replace(small, prompts=["a red cat", "x"]), lineup.teacher(3.0)),
        (replace(small, negative_prompt="x"), lineup.teacher(3.0)),
        (replace(small, identity={"unet": "another"}), lineup.teacher(3.0)),
    ]
    for count, (other, contestant) in enumerate(others, start=2):
        other.sampled(contestant)
        assert len(shards(campaign)) == count


@pytest.mark.parametrize("name", ["unet/config.json", "model_index.json", "vae/config.json"])
def test_an_edited_configuration_is_another_model(tiny: Model, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny.files.folder, tmp_path / "copy")
    copy = replace(tiny, files=replace(tiny.files, folder=tmp_path / "copy"))
    assert identity_of(copy) == identity_of(tiny)
    write_json(tmp_path / "copy" / name, read_json(tmp_path / "copy" / name) | {"sample_size": 12})
    assert identity_of(copy) != identity_of(tiny)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_shard_keeps_its_name_in_another_process(campaign: Campaign, sampler: str) -> None:
    # diffusers lists the settings that were left to their defaults in the order of a set of strings.
    contestant = Lineup(model=campaign.model, sampler=sampler, steps=STEPS).teacher(3.0)

    def in_another_order() -> SchedulerMixin:
        scheduler = contestant.make_scheduler()
        listed = scheduler.config.get("_use_default_values", [])
        scheduler._internal_dict = FrozenDict(scheduler.config | {"_use_default_values": [*listed[::-1], "another"]})
        return scheduler

    assert campaign._key(contestant, 0) == campaign._key(replace(contestant, make_scheduler=in_another_order), 0)


def test_a_damaged_shard_is_drawn_again(campaign: Campaign) -> None:
    contestant = Lineup(model=campaign.model, sampler="ddim", steps=STEPS).teacher(1.0)
    before = campaign.sampled(contestant)
    for path, content in zip(sorted(shards(campaign)), (b"", b"x" * 30), strict=False):
        path.write_bytes(content)
    assert torch.equal(campaign.sampled(contestant).features, before.features)


def test_two_runs_may_share_a_folder(campaign: Campaign) -> None:
    contestant = Lineup(model=campaign.model, sampler="ddim", steps=STEPS).teacher(3.0)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda run: run.sampled(contestant), [campaign, replace(campaign)])
    assert torch.equal(one.features, other.features)
    assert {path.suffix for path in shards(campaign)} == {".safetensors"}
    assert len(shards(campaign)) == 3


WORKER = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from boostdiff.engine import embedded
from boostdiff.benchmarks.quality.features import EfficientNetLite0Features
from boostdiff.benchmarks.quality.reference import Reference
from boostdiff.benchmarks.session import Lineup
from boostdiff.benchmarks.quality.quality import judge
from boostdiff.benchmarks.quality.samples import Campaign, launched_processes
from boostdiff.engine.model import load, locate

processes = launched_processes(torch.device("cpu"))
model = load(locate(sys.argv[2]), device=torch.device("cpu"))
counted = []
campaign = Campaign(
    model=model, network=EfficientNetLite0Features(), prompts=[f"a {i}" for i in range(8)], seed=5, batch_size=2,
    cache=Path(sys.argv[3]), shard=2, on_images=lambda name, count: counted.append(count),
)
lineup = Lineup(model=model, sampler="ddim", steps=2)
rows = [lineup.teacher(3.0), lineup.teacher(1.0)]
campaign = campaign.fill(rows, processes)
Path(sys.argv[3], f"{processes.process_index}.count").write_text(str(sum(counted)))
if processes.is_main_process:
    # The other process is gone: nothing must wait for it.
    reference = Reference.load(embedded.REFERENCE)
    print(judge(campaign, rows, reference=reference).rows[1].distance)
"""


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
    campaign = Campaign(
        model=tiny, network=network, prompts=[f"a {i}" for i in range(8)], seed=5, batch_size=2, cache=cache, shard=2
    )
    contestant = Lineup(model=tiny, sampler="ddim", steps=2).teacher(3.0)
    together = campaign.sampled(contestant)
    assert len(list(cache.glob("*.safetensors"))) == 8
    # One thread there, several here: a pixel may round to its neighbour, which other images are far beyond.
    alone = replace(campaign, cache=None)
    expected = alone.sampled(contestant).features
    unlike = alone.sampled(Lineup(model=tiny, sampler="ddim", steps=2).teacher(1.0)).features
    difference = (together.features - expected).abs().mean()
    assert difference < 0.02 * (unlike - expected).abs().mean()

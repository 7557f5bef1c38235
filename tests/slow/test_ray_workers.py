"""Shards over a Ray cluster of two machines: one is killed while it draws, the run itself is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import PROMPTS

pytest.importorskip("ray", reason="the extra serve has it")
pytestmark = pytest.mark.slow
IMAGES, PER_SHARD = 240, 8


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


def command(engine: Path, prompts: Path, output: Path, *options: str) -> list[str]:
    size = ("--shard-size", str(PER_SHARD), "--steps", "20", "--device", "cpu")
    said = ("--runner", "onnx", "--engine", str(engine), "--prompts", str(prompts), "--output", str(output))
    return [sys.executable, "-m", "boostdiff", "generate", *said, *size, *options]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def wait_for(count: int, folder: Path, run: subprocess.Popen[bytes]) -> None:
    for _ in range(3000):
        if len(list(folder.glob("*.tar"))) >= count:
            return
        assert run.poll() is None, "it ended early"
        time.sleep(0.1)
    raise AssertionError(f"{count} shards took more than five minutes")


def test_the_same_files_whatever_is_killed(engines: dict[str, Path], tmp_path: Path, cluster: Any) -> None:
    engine, prompts = engines["lora"], tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS[i % len(PROMPTS)] for i in range(IMAGES)))
    subprocess.run(command(engine, prompts, tmp_path / "alone"), check=True)
    expected = shards(tmp_path / "alone")
    assert len(expected) == IMAGES // PER_SHARD

    node, output = cluster.add_node(num_cpus=1), tmp_path / "over-two"
    ray = ("--ray", cluster.address)
    run = subprocess.Popen(command(engine, prompts, output, *ray))
    wait_for(4, output, run)
    run.send_signal(signal.SIGKILL)
    run.wait()
    first = set(shards(output))
    assert 4 <= len(first) < len(expected)

    stamps = {name: os.stat(output / name).st_mtime_ns for name in first}
    run = subprocess.Popen(command(engine, prompts, output, *ray, "--json"), stdout=subprocess.PIPE)
    wait_for(len(first) + 4, output, run)
    cluster.remove_node(node, allow_graceful=False)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0
    assert json.loads(said)["drawn"] == len(expected) - len(first)
    assert shards(output) == expected
    assert stamps == {name: os.stat(output / name).st_mtime_ns for name in first}, "what was there was drawn again"
    assert not list(output.glob(".*partial"))


@pytest.mark.parametrize(
    "address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nowhere.invalid:6379", "auto", "127.0.0.1:99999"]
)
def test_no_cluster_there(engines: dict[str, Path], tmp_path: Path, address: str) -> None:
    (tmp_path / "prompts.txt").write_text("a red cat")
    ran = subprocess.run(
        command(engines["lora"], tmp_path / "prompts.txt", tmp_path / "out", "--ray", address),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"boostdiff: error: can't reach a Ray cluster at '{address}'")
    assert ran.stderr.count("\n") == 1
    assert not ran.stdout

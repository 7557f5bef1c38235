"""`boostdiff serve` on Ray: the official client, a replica killed under load, and a stop while it draws."""

import json
import os
import signal
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from boostdiff.benchmarks.studies.serving import Answer, ask, free_port, is_right, load, served, wait_until_ready
from boostdiff.engine.exported import Engine
from PIL import Image
from tiny import PROMPTS

pytest.importorskip("ray", reason="the extra serve has it")
pytestmark = pytest.mark.slow
STEPS = 60
"""Many, so that there is time to kill."""


def replicas(parent: psutil.Process) -> list[psutil.Process]:
    """The processes that draw, of this server or this machine's raylet alone."""
    found = []
    for process in parent.children(recursive=True):
        try:
            if "ServeReplica:boostdiff:model-0" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def lost_of(answers: list[Answer], expected: list[Image.Image]) -> list[int]:
    """Numbers of the requests that got an error, which says to try again; all others have the engine's own image."""
    lost = [number for number, answer in enumerate(answers) if answer.status != 200]
    print(f"{len(lost)} of {len(answers)} requests got an error: {sorted({answers[i].status for i in lost})}")
    assert all(answers[number].status >= 500 for number in lost)
    assert all(is_right(answers[i], expected[i]) for i in range(len(answers)) if i not in lost)
    return lost


def code_of(url: str) -> str:
    """What code a request is refused with that waits for no image, or "" where it is answered."""
    try:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=60):  # noqa: S310
            return ""
    except urllib.error.HTTPError as error:
        content = error.read().decode()
        return json.loads(content)["error"]["code"] if content.startswith("{") else content
    except OSError as error:
        return str(error)


def test_serving(engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine = str(engines["lora"])
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(96)]
    with Engine.load(engine, runner="onnx", device="cpu") as opened:
        expected = opened(prompts, steps=STEPS, seed=0)
    with served("--engine", engine, "--runner", "onnx") as (server, url):
        answers, _ = load(url, prompts, clients=16, steps=STEPS)
        assert all(is_right(answer, image) for answer, image in zip(answers, expected, strict=True))
        assert max(answer.batch for answer in answers) > 1

        try:
            import openai
        except ImportError:
            print("the openai client is not installed: not tried")
        else:
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
            image = client.images.generate(prompt=PROMPTS[0], size="16x16", extra_body={"seed": 0}).data[0]
            assert len(image.b64_json) > 100
            with pytest.raises(openai.BadRequestError, match="can't draw"):
                client.images.generate(prompt=PROMPTS[0], size="24x16")
            kinds = [event.type for event in client.images.generate(prompt="a", stream=True, partial_images=1)]
            assert kinds == ["image_generation.partial_image", "image_generation.completed"]

        # A replica is killed under load: each answer is right, or an error that says to try again.
        process = psutil.Process(server.pid)
        (victim,) = replicas(process)
        with ThreadPoolExecutor(1) as pool:
            loaded = pool.submit(load, url, prompts, clients=8, steps=STEPS)
            time.sleep(1)
            victim.kill()
            answers, _ = loaded.result()
        lost = lost_of(answers, expected)
        wait_until_ready(server, url)
        assert replicas(process) != [victim]
        for number in lost:
            assert is_right(ask(url, prompt=prompts[number], seed=number, steps=STEPS), expected[number])

        # What is being drawn when it is stopped is finished, and nothing else begins.
        with ThreadPoolExecutor(1) as pool:
            loaded = pool.submit(load, url, prompts[:64], clients=64, steps=STEPS)
            time.sleep(1)
            os.kill(server.pid, signal.SIGTERM)
            codes = []
            while not loaded.done():
                code = code_of(url)
                codes += [] if loaded.done() else [code]
                time.sleep(0.02)
            answers, _ = loaded.result()
        assert "stopping" in codes
        assert set(codes[codes.index("stopping") :]) == {"stopping"}, "the API went before its requests were answered"
        assert all(is_right(answer, image) for answer, image in zip(answers, expected, strict=False))
        assert server.wait(120) == 0


def test_two_machines_of_which_one_is_lost(
    engines: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The configuration of a cluster, as docs/serving has it, over two local nodes."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    engine, port = engines["lora"].resolve(), free_port()
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(96)]
    with Engine.load(engine, runner="onnx", device="cpu") as opened:
        expected = opened(prompts, steps=STEPS, seed=0)
    model = {
        "name": "tiny",
        "engine": str(engine),
        "runner": "onnx",
        "device": "cpu",
        "deployment": {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}},
    }
    application = {
        "name": "boostdiff",
        "import_path": "boostdiff.serve.deployment:build",
        "args": {"models": [model], "api_replicas": 2, "storage": str(tmp_path / "images")},
    }
    config = tmp_path / "serve.yaml"
    # JSON is YAML.
    config.write_text(json.dumps({"http_options": {"port": port}, "applications": [application]}))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes = [cluster.head_node, cluster.add_node(num_cpus=1)]
        raylets = [psutil.Process(node.all_processes["raylet"][0].process.pid) for node in nodes]
        with served("--config", str(config), "--address", cluster.address, port=port) as (server, url):
            assert [len(replicas(raylet)) for raylet in raylets] == [1, 1], "the replicas are not spread"
            with ThreadPoolExecutor(1) as pool:
                loaded = pool.submit(load, url, prompts, clients=8, steps=STEPS)
                time.sleep(1)
                cluster.remove_node(nodes[1], allow_graceful=False)
                answers, _ = loaded.result()
            lost = lost_of(answers, expected)
            wait_until_ready(server, url)
            for number in lost:
                assert is_right(ask(url, prompt=prompts[number], seed=number, steps=STEPS), expected[number])
    finally:
        cluster.shutdown()

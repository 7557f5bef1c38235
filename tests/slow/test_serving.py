"""`boostdiff serve` on Ray: the official client, a replica killed under load, and a stop while it draws."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from boostdiff.benchmarks.studies.serving import ask, is_right, load, served, wait_until_ready
from boostdiff.engine.exported import Engine
from tiny import PROMPTS

pytest.importorskip("ray", reason="the extra serve has it")
pytestmark = pytest.mark.slow
STEPS = 60
"""Many, so that there is time to kill."""


def replicas(server: psutil.Process) -> list[psutil.Process]:
    """The processes of this server alone that draw."""
    found = []
    for process in server.children(recursive=True):
        try:
            if "ServeReplica:boostdiff:model-0" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


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
        lost = [number for number, answer in enumerate(answers) if answer.status != 200]
        print(f"{len(lost)} of {len(answers)} requests got an error: {sorted({answers[i].status for i in lost})}")
        assert all(answers[number].status >= 500 for number in lost)
        assert all(is_right(answers[i], expected[i]) for i in range(len(answers)) if i not in lost)
        wait_until_ready(server, url)
        assert replicas(process) != [victim]
        for number in lost:
            assert is_right(ask(url, prompt=prompts[number], seed=number, steps=STEPS), expected[number])

        # What is being drawn when it is stopped is finished.
        with ThreadPoolExecutor(1) as pool:
            loaded = pool.submit(load, url, prompts[:16], clients=16, steps=STEPS)
            time.sleep(0.5)
            os.kill(server.pid, signal.SIGTERM)
            answers, _ = loaded.result()
        assert all(is_right(answer, image) for answer, image in zip(answers, expected, strict=False))
        assert server.wait(120) == 0

"""What the workers of a Ray cluster ask for."""

from types import SimpleNamespace
from typing import Any

import pytest
from boostdiff.engine.errors import InputError

pytest.importorskip("ray", reason="the extra serve has it")

from boostdiff.engine import ray_workers


@pytest.mark.parametrize(
    ("machines", "count", "expected"),
    [
        ([{"CPU": 1}, {"CPU": 1}], 1, (1, {"num_cpus": 1})),
        ([{"CPU": 4}, {"CPU": 2}], 1, (1, {"num_cpus": 4})),
        ([{"CPU": 5}, {"CPU": 3}], 2, (2, {"num_cpus": 3})),
        ([{"CPU": 4}, {"CPU": 4}], 4, (4, {"num_cpus": 2})),
        ([{"CPU": 2}], 5, (5, {"num_cpus": 1})),
        ([{"CPU": 4}, {}, {"CPU": 2}], None, (2, {"num_cpus": 2})),
        ([{"CPU": 4, "GPU": 2}, {"CPU": 4}], None, (2, {"num_gpus": 1})),
        ([{"CPU": 4, "GPU": 2}], 3, (3, {"num_gpus": 1})),
    ],
)
def test_a_worker_fits_on_a_machine(
    monkeypatch: pytest.MonkeyPatch, machines: list[dict[str, float]], count: int | None, expected: Any
) -> None:
    nodes = [{"Alive": True, "Resources": each} for each in machines] + [{"Alive": False, "Resources": {"CPU": 99}}]
    monkeypatch.setattr(ray_workers, "ray", SimpleNamespace(nodes=lambda: nodes))
    assert ray_workers.worker_options(count) == expected


@pytest.mark.parametrize("count", [None, 2])
def test_no_machine_can_take_a_worker(monkeypatch: pytest.MonkeyPatch, count: int | None) -> None:
    nodes = [{"Alive": True, "Resources": {"memory": 1e9}}, {"Alive": True, "Resources": {"CPU": 0.5}}]
    monkeypatch.setattr(ray_workers, "ray", SimpleNamespace(nodes=lambda: nodes))
    with pytest.raises(InputError, match="no machine of the Ray cluster"):
        ray_workers.worker_options(count)

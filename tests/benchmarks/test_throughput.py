from itertools import pairwise

import pytest
import torch
from boostdiff.benchmarks.throughput import Spread, interleaved


def test_spread() -> None:
    spread = Spread.of([float(x) for x in range(11)])
    assert (spread.median, spread.p10, spread.p90, spread.runs) == (5, 1, 9, 11)


@pytest.mark.parametrize(("runs", "warm_up"), [(4, 1), (3, 0), (5, 2)])
def test_calls_take_turns_and_warm_ups_are_dropped(runs: int, warm_up: int) -> None:
    calls: list[str] = []
    seconds = interleaved(
        lambda: calls.append("a"),
        lambda: calls.append("b"),
        device=torch.device("cpu"),
        runs=runs,
        warm_up=warm_up,
    )
    assert [len(values) for values in seconds] == [runs, runs]
    pairs = ["".join(calls[i : i + 2]) for i in range(0, len(calls), 2)]
    assert len(pairs) == runs + warm_up
    assert all(set(pair) == {"a", "b"} for pair in pairs)
    assert all(one != two for one, two in pairwise(pairs))

"""The study of `boostdiff serve`: what it refuses before any work, and what its table counts."""

import numpy as np
import pytest
from boostdiff.engine.errors import InputError
from PIL import Image

pytest.importorskip("psutil")

from boostdiff.benchmarks.studies.serving import Answer, Load, _table, serve


@pytest.mark.parametrize("clients", ["0", "4,-1"])
def test_a_number_of_clients(clients: str) -> None:
    with pytest.raises(InputError, match="--clients must be at least 1"):
        serve(clients=clients)


def test_refusals_make_an_overloaded_server_no_quicker() -> None:
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    drawn = [Answer(status=200, seconds=2.0 + index, batch=4, pixels=pixels) for index in range(4)]
    refused, broken = [Answer(status=503, seconds=0.01)] * 5, [Answer(status=0, seconds=0.5)]

    def row(answers: list[Answer]) -> dict[str, str]:
        expected = [Image.fromarray(pixels)] * len(answers)
        table = _table([Load(len(answers), answers, 2.0, 0.0)], expected, direct=4.0)
        return dict(zip(table.headings, table.cells[0], strict=True))

    alone, overloaded, useless = row(drawn), row([*refused, *drawn, *broken]), row(refused)
    shared = ("images per second", "p50 s", "p95 s", "p99 s", "batch", "wrong images")
    assert [alone[name] for name in shared] == ["2.00", "4.00", "5.00", "5.00", "4.0", "0"]
    assert [overloaded[name] for name in shared] == [alone[name] for name in shared]
    assert (alone["refused"], alone["errors"]) == ("0", "0")
    assert (overloaded["refused"], overloaded["errors"]) == ("5", "1")
    assert (useless["p50 s"], useless["batch"], useless["refused"]) == ("–", "–", "5")

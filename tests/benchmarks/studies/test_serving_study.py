"""What the study of `boostdiff serve` refuses before any work."""

import pytest
from boostdiff.engine.errors import InputError

pytest.importorskip("psutil")

from boostdiff.benchmarks.studies.serving import serve


@pytest.mark.parametrize("clients", ["0", "4,-1"])
def test_a_number_of_clients(clients: str) -> None:
    with pytest.raises(InputError, match="--clients must be at least 1"):
        serve(clients=clients)

from pathlib import Path

import pytest
from boostdiff.engine.errors import InputError
from boostdiff.teacher.results import remembered


def test_a_result_is_measured_once(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    measured = []

    def measure() -> int:
        measured.append(1)
        return len(measured)

    assert [remembered(path, key, measure) for key in ("a", "b", "a")] == [1, 2, 1]
    path.write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        remembered(path, "a", measure)

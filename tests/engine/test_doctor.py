import tomllib
from pathlib import Path

import pytest
from boostdiff.engine import doctor
from boostdiff.engine.doctor import EXTRAS, _extra, _tensorrt, examine, table
from boostdiff.engine.trt import RTX_COMPUTE_CAPABILITIES
from boostdiff.engine.versions import to_install
from rich.console import Console


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 1), *RTX_COMPUTE_CAPABILITIES])
def test_tensorrt_for_rtx_runs_where_its_plans_are_for(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    _, rtx = _tensorrt(gpu=True)
    assert ("runs here too" in rtx.use) == (capability in RTX_COMPUTE_CAPABILITIES)


def test_every_extra_is_looked_for() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # The first two are what the rows before look for; the last is for those who work on this.
    assert {extra for _, extra, *_ in EXTRAS} | {"cpu", "gpu", "dev"} == set(extras["optional-dependencies"])
    names = [finding.name for finding in examine()]
    assert {"Ray Serve", "torchao", "torch-fidelity", "resvg", "boostdiff serve"} <= set(names)
    assert [str(column.header) for column in table([]).columns][3] == "used by"


@pytest.mark.parametrize(
    ("there", "found"),
    [((), "not installed"), (("ray",), "lacks fastapi, yaml"), (("ray", "yaml"), "lacks fastapi")],
)
def test_an_extra_is_ready_when_all_of_it_is_there(
    there: tuple[str, ...], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = next(each for each in EXTRAS if each[1] == "serve")
    monkeypatch.setattr(doctor, "is_installed", there.__contains__)
    finding = _extra(*row)
    assert (finding.ready, finding.found, finding.install) == (False, found, to_install("serve"))
    monkeypatch.setattr(doctor, "is_installed", lambda name: True)
    assert _extra(*row).ready
    assert not _extra(*row).install


def test_a_folder_of_a_modules_name_is_no_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_module").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not _extra("x", "fid", ("no_such_module",), "bench").ready


def test_the_table_shows_an_extras_brackets() -> None:
    console = Console(width=200, record=True)
    console.print(table([_extra("x", "fid", ("no_such_module",), "bench")]))
    assert "pip install -e '.[fid]' in BoostDiff's source folder" in console.export_text()

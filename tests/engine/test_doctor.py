import pytest
from boostdiff.engine.doctor import _tensorrt
from boostdiff.engine.trt import RTX_COMPUTE_CAPABILITIES


@pytest.mark.parametrize("capability", [(7, 5), (9, 0), (12, 1), *RTX_COMPUTE_CAPABILITIES])
def test_tensorrt_for_rtx_runs_where_its_plans_are_for(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    _, rtx = _tensorrt(gpu=True)
    assert ("runs here too" in rtx.use) == (capability in RTX_COMPUTE_CAPABILITIES)

from pathlib import Path

import pytest
import torch
from boostdiff.engine.adapters import LORA_FILE
from boostdiff.engine.errors import BoostDiffError, InputError
from boostdiff.engine.merge import check_merge, merge_and_check, merge_in_place, merged_copy
from boostdiff.engine.model import Model, ModelFiles, load
from boostdiff.engine.student import apply_student, read_student
from safetensors.torch import save_file
from tiny import CPU


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_merged_equals_base_plus_adapter(
    tiny: Model, tiny_files: ModelFiles, students: dict[str, Path], method: str
) -> None:
    folder = students[method]
    base = {name: tensor.clone() for name, tensor in tiny.denoiser.state_dict().items()}
    merged = merged_copy(tiny, folder, read_student(folder))
    assert all(torch.equal(tensor, base[name]) for name, tensor in tiny.denoiser.state_dict().items())
    assert merged.state_dict().keys() == base.keys()
    adapted = load(tiny_files, device=CPU)
    apply_student(adapted.denoiser, folder, read_student(folder))
    inputs = tiny.family.example_inputs(tiny.pipeline, 2)
    with torch.no_grad():
        expected, got, unchanged = (unet(**inputs).sample for unet in (adapted.denoiser, merged, tiny.denoiser))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (got - unchanged).abs().max() > 1e-3
    check = merge_and_check(tiny, folder, read_student(folder))
    assert check.relative < 1e-5
    assert check.cosine > 0.99999
    assert check.change > 1e-3
    with torch.no_grad():
        in_place = tiny.denoiser(**inputs).sample
    torch.testing.assert_close(in_place, got, atol=0, rtol=0)
    assert tiny.denoiser.state_dict().keys() == base.keys()


def test_the_proof_fails_for_a_wrong_merge() -> None:
    base = torch.randn(5, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    adapted = base + 0.1
    assert check_merge(base=base, adapted=adapted, merged=adapted.clone()).relative == 0
    with pytest.raises(BoostDiffError, match="differs from base"):
        check_merge(base=base, adapted=adapted, merged=adapted + 0.01)
    with pytest.raises(BoostDiffError, match="changes nothing"):
        check_merge(base=base, adapted=base, merged=base)


def test_a_lora_of_another_architecture(tiny: Model, students: dict[str, Path], tmp_path: Path) -> None:
    info = read_student(students["lora"])
    for name in ("unet.x", "conv"):
        tensors = {f"{name}.lora_{side}.weight": torch.zeros(1, 1) for side in "AB"}
        save_file(tensors, tmp_path / LORA_FILE)
        with pytest.raises(InputError, match="does not fit"):
            merge_in_place(tiny.denoiser, tmp_path, info)


def test_merging_is_repeatable(tiny: Model, students: dict[str, Path]) -> None:
    info = read_student(students["lora"])
    one, two = (merged_copy(tiny, students["lora"], info).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)

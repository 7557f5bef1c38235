from types import SimpleNamespace

import pytest
import torch
from boostdiff.benchmarks.studies.profile import KINDS, break_down, kernels_of, kind_of, table, union
from boostdiff.engine.model import Model
from boostdiff.engine.runners import TorchRunner
from tiny import CPU
from torch.autograd import DeviceType


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_f16_256x128>", "matrix product"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::RowwiseMomentsCUDAKernel<c10::Half>", "normalisation"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "pointwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_poi_fused_add_silu_3", "pointwise"),
        ("triton_poi_fused_convolution_silu_4", "pointwise"),
        ("triton_red_fused_native_group_norm_convolution_5", "normalisation"),
        ("triton_per_fused__softmax_6", "attention"),
        ("triton_tem_fused_convolution_7", "convolution"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::native_group_norm", "normalisation"),
        ("unheard_of", "other"),
    ],
)
def test_kernels_have_kinds(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_overlapping_spans_count_once() -> None:
    assert union([(0, 2), (5, 6), (1, 3), (1.5, 2)]) == 4
    assert union([]) == 0


def event(name: str, begin: float, end: float, *, device: DeviceType, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        device_type=device,
        is_user_annotation=annotation,
        time_range=SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin),
        self_cpu_time_total=end - begin,
    )


def test_a_gpus_kernels_are_told_from_what_launched_them() -> None:
    events = [
        event("aten::mm", 0, 10, device=DeviceType.CPU),
        event("gemm", 5, 25, device=DeviceType.CUDA),
        event("gemm", 20, 30, device=DeviceType.CUDA),
        event("## Call CompiledFxGraph", 0, 100, device=DeviceType.CUDA, annotation=True),
    ]
    busy, kernels = kernels_of(events, torch.device("cuda"))
    assert busy == pytest.approx(25e-6)
    assert kernels == {"gemm": (pytest.approx(30e-6), 2)}
    assert kernels_of(events, CPU)[1] == {"aten::mm": (pytest.approx(10e-6), 1)}


def test_a_batch_is_broken_down(tiny: Model) -> None:
    row = break_down(
        TorchRunner(tiny.unet), tiny, batch_size=2, sampler="dpm++", steps=3, flops=10**6, peak=0.5, runs=3
    )
    assert row.kinds.keys() == {*KINDS, "other"}
    assert all(row.kinds[kind] > 0 for kind in ("convolution", "matrix product", "attention", "normalisation"))
    assert row.busy == pytest.approx(sum(row.kinds.values()))
    assert 0 < sum(row.parts.values()) < 1.5 * row.total
    assert row.peak_share == pytest.approx(2 * 3 * 1e6 / row.parts["unet"] / 0.5e12)
    # Once a step, and one step at the longest takes an operator's many calls.
    assert max(count for _, _, count in row.longest) >= 3
    heading, _, line = table([row]).splitlines()
    assert heading.count("|") == line.count("|")
    assert line.startswith("| torch | 2 |")

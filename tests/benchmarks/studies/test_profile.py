from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from boostdiff.benchmarks.speed.random_weights import locate_configs
from boostdiff.benchmarks.speed.throughput import Workload
from boostdiff.benchmarks.studies.profile import (
    OPERATIONS,
    UPDATES,
    break_down,
    kernels_of,
    one_update,
    operation_of,
    table,
)
from boostdiff.engine.model import Model
from boostdiff.engine.runners import TorchRunner
from boostdiff.engine.schedulers import make_scheduler
from tiny import CPU
from torch.autograd import DeviceType


@pytest.mark.parametrize(
    ("kernel", "operation"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix product"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_f16_s16816gemm_f16_256x128>", "matrix product"),
        ("pytorch_flash::flash_fwd_kernel", "attention"),
        ("void at::native::RowwiseMomentsCUDAKernel<c10::Half>", "normalization"),
        ("void at::native::vectorized_elementwise_kernel<4, silu>", "pointwise"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_poi_fused_add_silu_3", "pointwise"),
        ("triton_poi_fused_convolution_silu_4", "pointwise"),
        ("triton_red_fused_native_group_norm_convolution_5", "normalization"),
        ("triton_per_fused__softmax_6", "attention"),
        ("triton_tem_fused_convolution_7", "convolution"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::native_group_norm", "normalization"),
        ("unheard_of", "other"),
    ],
)
def test_kernels_are_told_by_their_names(kernel: str, operation: str) -> None:
    assert operation_of(kernel) == operation


def event(name: str, microseconds: float, *, device: DeviceType, annotation: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        key=name,
        device_type=device,
        is_user_annotation=annotation,
        self_device_time_total=microseconds,
        self_cpu_time_total=microseconds,
        count=2,
    )


def test_a_gpus_kernels_are_told_from_what_launched_them() -> None:
    events = [
        event("aten::mm", 10, device=DeviceType.CPU),
        event("short", 5, device=DeviceType.CUDA),
        event("gemm", 30, device=DeviceType.CUDA),
        event("## Call CompiledFxGraph", 100, device=DeviceType.CUDA, annotation=True),
    ]
    assert kernels_of(events, torch.device("cuda")) == [
        ("gemm", pytest.approx(30e-6), 2),
        ("short", pytest.approx(5e-6), 2),
    ]
    assert kernels_of(events, CPU) == [("aten::mm", pytest.approx(10e-6), 2)]


def test_a_batch_is_broken_down(tiny: Model) -> None:
    work = Workload(
        model=tiny,
        prompts=["a red cat"] * 2,
        guidance=1.0,
        make_scheduler=lambda: make_scheduler("dpm++", tiny.pipeline.scheduler.config),
        steps=3,
    )
    row = break_down(TorchRunner(tiny.denoiser), work, 3)
    assert row.operations.keys() == OPERATIONS.keys()
    assert all(row.operations[name] > 0 for name in ("convolution", "matrix product", "attention", "normalization"))
    # Once a step, and one step at the longest takes an operator's many calls.
    assert max(count for _, _, count in row.longest) >= 3
    heading, _, line = table([row]).splitlines()
    assert heading.count("|") == line.count("|")
    assert line.startswith("| torch | 2 |")


def test_memory_of_an_update(tiny_folder: Path) -> None:
    """The teacher's pass is in the distillation alone."""
    measured = {update: one_update(update, locate_configs(str(tiny_folder)), 1, False) for update in UPDATES}
    assert all(0 < result["before"] <= result["peak"] for result in measured.values())

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from artworks import make_artworks
from boostdiff.engine.embedded import MODEL_DIR
from boostdiff.engine.errors import InputError
from boostdiff.engine.terminal import run
from boostdiff.teacher.architecture import make_unet, make_vae
from boostdiff.teacher.optimize import learning_rate_factor, mean_over_processes, optimize, step_generator
from boostdiff.teacher.train import app, diffusion, the_tokenizer, vae
from safetensors.torch import load_file, save_file


def test_the_schedule_warms_up_stays_and_decays() -> None:
    factors = torch.tensor([learning_rate_factor(step, steps=1000) for step in range(1000)])
    assert factors[0] == pytest.approx(0.01)
    assert (factors[100:600] == 1).all()
    assert (factors[600:].diff() < 0).all()
    assert factors[-1] < 1e-4


def train(checkpoint: Path, steps: int, header: dict[str, Any] | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 1)

    def loss_of(step: int) -> torch.Tensor:
        x = torch.randn(8, 4, generator=step_generator(0, step))
        return (layer(x) - x.sum(dim=1, keepdim=True)).square().mean()

    optimize(
        name="test",
        modules={"layer": layer},
        loss_of=loss_of,
        checkpoint=checkpoint,
        steps=steps,
        learning_rate=0.05,
        checkpoint_minutes=0,
        header=header,
    )
    return layer.weight.detach().clone()


def test_training_resumes_exactly_and_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", 200)
    assert (whole - 1).abs().max() < 0.2
    monkeypatch.setattr("boostdiff.teacher.optimize.learning_rate_factor", lambda step, *, steps: 1.0)
    expected = train(tmp_path / "a", 60)
    train(tmp_path / "b", 25)
    assert torch.equal(train(tmp_path / "b", 60), expected)


@pytest.mark.parametrize(
    ("begun", "now", "says"),
    [
        ({}, {"start_from": "a"}, "with another --start-from: repeat it"),
        ({"start_from": "a"}, {"start_from": "b"}, "with another --start-from: repeat it"),
        ({"start_from": "a"}, None, "with another --start-from: repeat it"),
        ({"flow": True}, {}, "with another --flow: repeat it"),
        ({"start_from": "a"}, {"flow": True}, "with another --flow and --start-from: repeat it"),
    ],
)
def test_a_run_goes_on_as_it_was_begun_or_not_at_all(
    tmp_path: Path, begun: dict[str, Any], now: dict[str, Any] | None, says: str
) -> None:
    train(tmp_path / "c", 2, begun)
    before = (tmp_path / "c").read_bytes()
    with pytest.raises(InputError, match=says):
        train(tmp_path / "c", 4, now)
    assert (tmp_path / "c").read_bytes() == before
    assert not torch.equal(train(tmp_path / "c", 4, begun), train(tmp_path / "other", 2))


def test_what_a_diffusion_begins_with_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artworks, headers = make_artworks(4), list[dict[str, Any]]()
    monkeypatch.setattr("boostdiff.teacher.train.load_artworks", lambda work: artworks)
    monkeypatch.setattr("boostdiff.teacher.train.TOKENIZER_CAPTIONS", 50)
    monkeypatch.setattr("boostdiff.teacher.train.optimize", lambda *, header, **_: headers.append(header))
    pairs = torch.zeros(2, 2, dtype=torch.int64)
    latents = {"latents": torch.zeros(2, 4, 16, 16), "pairs": pairs, "scale": torch.tensor(1.0)}
    save_file(latents, tmp_path / "latents.safetensors")
    starts = [Path(shutil.copytree(MODEL_DIR, tmp_path / name)) for name in ("same", "text_encoder", "unet")]
    for folder in starts[1:]:
        (path,) = (folder / folder.name).glob("*.safetensors")
        weights = load_file(path)
        save_file({name: tensor + 1 for name, tensor in weights.items()}, path, metadata={"format": "pt"})
    diffusion(tmp_path, compiles=False)
    diffusion(tmp_path, compiles=False, flow=True)
    for folder in (MODEL_DIR, *starts):
        diffusion(tmp_path, compiles=False, start_from=folder)
    assert headers[:2] == [{"seed": 0, "batch": 64, "flow": flow} for flow in (False, True)]
    assert headers[2] == headers[3]
    assert len({header["start_from"] for header in headers[2:]}) == 3


def test_gradients_become_the_mean_of_all_shares() -> None:
    used, other, unused = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    used.grad, other.grad = torch.full((2, 2), 3.0), torch.arange(4.0).view(2, 2)
    accelerator = SimpleNamespace(reduce=lambda flat, reduction: (flat + 1) / 2)
    mean = mean_over_processes(accelerator, [unused, used, other], torch.tensor(5.0))
    assert mean.item() == 3
    assert used.grad.tolist() == [[2, 2], [2, 2]]
    assert other.grad.tolist() == [[0.5, 1], [1.5, 2]]
    assert unused.grad is None


SHARED_TRAINING = """
import sys
from pathlib import Path

import numpy as np
import torch
from artworks import make_artworks
from boostdiff.teacher import train
from safetensors.torch import save_file

work = Path(sys.argv[1])
artworks = make_artworks(12)
train.load_artworks, train.TOKENIZER_CAPTIONS = lambda folder: artworks, 50
# Made once: two tokenizers of the same captions differ.
if not (work / "latents.safetensors").exists():
    work.mkdir()
    pairs = torch.from_numpy(np.stack([np.flatnonzero(~artworks.held_out), np.flatnonzero(~artworks.held_out) % 3], 1))
    latents = torch.randn(len(pairs), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents, "pairs": pairs, "scale": torch.tensor(1.0)}, work / "latents.safetensors")
    train.the_tokenizer(work, artworks)
else:
    train.diffusion(work, steps=50, batch=6, compiles=False)
"""


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    script = tmp_path / "shared_training.py"
    script.write_text(SHARED_TRAINING)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def launched(folder: Path, processes: int) -> str:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", f"{processes}"]
        command = [sys.executable, *launch, str(script), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    launched(tmp_path / "1", 1)
    shutil.copytree(tmp_path / "1", tmp_path / "2")
    trained = []
    for processes in (1, 2):
        folder = tmp_path / f"{processes}"
        # One process prints and saves.
        assert launched(folder, processes).count("step 50/50") == 1
        trained.append(load_file(folder / "diffusion.checkpoint.safetensors"))
    one, two = trained
    assert one.keys() == two.keys()
    # Of half of each batch, or of a sum in place of the mean, the moments of the gradients would be others.
    for moment in ("exp_avg", "exp_avg_sq"):
        expected, got = (
            torch.cat([tensor.flatten() for key, tensor in each.items() if key.endswith(f"/{moment}")])
            for each in (one, two)
        )
        assert len(expected) > 6e6
        assert (got - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize(("stage", "missing"), [("diffusion", "latents"), ("latents", "vae"), ("save", "diffusion")])
def test_a_stage_names_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stage: str, missing: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", stage, "--work", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        run(app)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run the stage `{missing}`" in line


def test_networks_have_the_documented_size() -> None:
    assert sum(p.numel() for p in make_unet().parameters()) == pytest.approx(6.1e6, rel=0.01)
    vae = make_vae()
    assert sum(p.numel() for p in vae.parameters()) == pytest.approx(0.65e6, rel=0.01)
    assert vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean.shape == (1, 4, 16, 16)


def test_a_work_folder_keeps_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on must number the words as the run before it did."""
    monkeypatch.setattr("boostdiff.teacher.train.TOKENIZER_CAPTIONS", 50)
    caption = "noto emoji of octopus on a light blue background"
    one, other = (make_artworks(3, names=names) for names in (["octopus", "red apple", "cat"], ["a list", "of", "dog"]))
    first = the_tokenizer(tmp_path, one)
    again = the_tokenizer(tmp_path, other)
    assert again(caption).input_ids == first(caption).input_ids
    assert again.get_vocab() == first.get_vocab()
    assert the_tokenizer(tmp_path / "other", other).get_vocab() != first.get_vocab()


def test_a_checkpoint_of_another_seed_is_not_passed_off_as_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boostdiff.teacher.train.load_artworks", lambda work: make_artworks(12))
    monkeypatch.setattr("boostdiff.teacher.train.held_out_psnr", lambda model, artworks: 0.0)
    vae(tmp_path, steps=1, batch=2, seed=0)
    first = (tmp_path / "vae.safetensors").read_bytes()
    for other, option in (({"batch": 2, "seed": 1}, "--seed"), ({"batch": 3, "seed": 0}, "--batch")):
        with pytest.raises(InputError, match=f"begun with another {option}:"):
            vae(tmp_path, steps=1, **other)
    assert (tmp_path / "vae.safetensors").read_bytes() == first

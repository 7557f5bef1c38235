from pathlib import Path

import pytest
import torch
from boostdiff.distill.checkpoint import load_training_state, save_training_state
from boostdiff.engine.errors import InputError


def trained() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    for _ in range(3):
        layer(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer, optimizer


def test_a_restored_optimizer_takes_the_same_step(tmp_path: Path) -> None:
    layer, optimizer = trained()
    save_training_state(
        tmp_path / "c",
        step=3,
        weights=dict(layer.named_parameters()),
        optimizer=optimizer,
        data={"z": torch.ones(2)},
        header={"k": 1},
    )
    state = load_training_state(tmp_path / "c")
    assert (state.step, state.header, state.data["z"].tolist()) == (3, {"k": 1}, [1, 1])
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(state.weights)
    resumed = torch.optim.AdamW(other.parameters(), lr=9)
    resumed.load_state_dict(state.optimizer)
    for one, opt in ((layer, optimizer), (other, resumed)):
        one(torch.full((1, 3), 2.0)).sum().backward()
        opt.step()
    assert torch.equal(layer.weight, other.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_damage_is_an_error(tmp_path: Path) -> None:
    layer, optimizer = trained()
    path = tmp_path / "c"
    save_training_state(path, step=1, weights=dict(layer.named_parameters()), optimizer=optimizer)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=r"can't read the checkpoint .* delete it"):
        load_training_state(path)
    with pytest.raises(InputError, match=r"can't read the checkpoint .* delete it"):
        load_training_state(tmp_path / "missing")

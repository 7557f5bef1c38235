import torch
from boostdiff.teacher.backgrounds import backgrounds


def test_backgrounds_are_told_by_their_prompts() -> None:
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[0, 0] = 222
    images[1] = 255
    prompts = ["x on a red background", "x on a blue background", "just x"]
    assert backgrounds(prompts, images).tolist() == [1, 0, -1]

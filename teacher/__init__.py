"""The embedded model `emoji64` as data, and the recipe that made it.

At run time only the paths below are used; `dataset` and `train` are needed to make the model again.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODEL_NAME = "emoji64"
MODEL_DIR = ROOT / MODEL_NAME
TRAIN_PROMPTS = ROOT / "prompts" / "train.txt"
HELD_OUT_PROMPTS = ROOT / "prompts" / "held_out.txt"
REFERENCE = ROOT / "reference" / "efficientnet_lite0.safetensors"

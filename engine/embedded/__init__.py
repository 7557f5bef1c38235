"""The embedded model `emoji64` as data: where its weights, its caption model, its prompts and its reference lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent
MODEL_NAME = "emoji64"
MODEL_DIR = ROOT / MODEL_NAME
TRAIN_PROMPTS = ROOT / "prompts" / "train.txt"
HELD_OUT_PROMPTS = ROOT / "prompts" / "held_out.txt"
CAPTION_MODEL = ROOT / "emoji64-clip"
REFERENCE = ROOT / "reference" / "efficientnet_lite0.safetensors"

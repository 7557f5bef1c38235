"""Exported engines to be timed, where this machine can open them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

from ...engine.errors import BoostDiffError, InputError
from ...engine.exported import Engine


def opened_engine(
    folder: Path,
    *,
    runner: str,
    device: torch.device,
    precision: str | None,
    label: str,
    opened: ExitStack,
    left_out: dict[str, str],
) -> Engine | None:
    """An engine on a runner that is listed as available, open until `opened` is closed.

    None where a library that it needs is missing; `left_out` takes the reason, under the label.

    Raises:
        InputError: see `Engine.load`: what a user can put right.
    """
    try:
        engine = Engine.load(folder, runner=runner, device=str(device), precision=precision)
    except InputError:
        raise
    except BoostDiffError as error:
        left_out[label] = str(error)
        return None
    return opened.enter_context(engine)

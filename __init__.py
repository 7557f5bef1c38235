"""BoostDiff: classifier-free guidance distilled into a single pass."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine.exported import Engine

__version__ = "0.2.0.dev0"
__all__ = ["Engine", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazily: importing the package alone must not take torch's seconds.
    if name == "Engine":
        from .engine.exported import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

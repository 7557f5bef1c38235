"""BoostDiff: classifier-free guidance distilled into a single pass."""

__version__ = "0.2.0.dev0"

"""Which versions made a file."""

from importlib.metadata import PackageNotFoundError, version

from .. import __version__

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate", "onnx", "onnxruntime", "polygraphy")


def versions(*more: str) -> dict[str, str]:
    """Versions of boostdiff and of the installed libraries that matter."""
    found = {"boostdiff": __version__}
    for name in (*LIBRARIES, *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

"""Another student's weights in plans that are built already: seconds instead of minutes.

Replaced weights are never trusted: `export` compares a refitted plan with torch like any other before it is accepted
(TensorRT 11.3 lost a bias on the way).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ..engine.errors import BoostDiffError, InputError
from ..engine.files import sha256_of
from ..engine.manifest import Manifest, read_manifest, verified_file
from ..engine.trt import check_plan, load_tensorrt
from .config import ExportConfig
from .graph import graph_signature


def refittable_engine(folder: Path, config: ExportConfig, inputs: dict[str, str]) -> Manifest:
    """The manifest of an engine whose plans can take new weights.

    Args:
        folder: the engine.
        config: configuration of the export that will reuse its plans; must ask for the same shapes and precision.
        inputs: hashes of the new export's inputs; all but the adapter must be the engine's own.

    Raises:
        InputError: there is no such engine, it is of another model or has other shapes, or its plans are fixed.
        BoostDiffError: this machine can't run its plans, and so neither change nor check them.
    """
    manifest = read_manifest(folder)
    plans = {name: artefact for name, artefact in manifest.artefacts.items() if name.endswith(".plan")}
    if not plans or not all(plan["refittable"] for plan in plans.values()):
        raise InputError(f"the plans in {folder} can't take other weights: export with --trt --refittable first")
    changed = sorted(key for key in inputs if key != "adapter" and inputs[key] != manifest.inputs.get(key))
    if changed:
        raise InputError(f"the engine in {folder} is of another model ({', '.join(changed)} differ): export anew")
    for option in ("batch", "size", "precision"):
        if config.as_json()[option] != manifest.options.get(option):
            raise InputError(f"the engine in {folder} was exported with another --{option}: repeat it, or export anew")
    for plan in plans.values():
        check_plan(plan)
    return manifest


def plan_by_refit(engine: Path, manifest: Manifest, graph: Path, plan: Path) -> dict[str, Any]:
    """Write `plan`: the engine's plan of the same part with the weights of `graph`.

    Args:
        engine: the engine folder.
        manifest: from `refittable_engine`.
        graph: the new student's FP16 graph, of the same structure.
        plan: where to write; `…/PART/model.plan`.

    Returns:
        The plan's entry for the manifest.

    Raises:
        BoostDiffError: TensorRT refuses the weights.
    """
    name = f"{plan.parent.name}/{plan.name}"
    entry = dict(manifest.artefacts[name]) | graph_signature(graph)
    entry.pop("check", None)
    old = verified_file(engine, manifest, name)
    graph_files = (graph, graph.with_name(f"{graph.name}.data"))
    if all(sha256_of(path) == manifest.files.get(f"{path.parent.name}/{path.name}") for path in graph_files):
        # The text encoder and the VAE are the same for every student.
        shutil.copyfile(old, plan)
        return entry
    trt = load_tensorrt(entry["flavour"])
    from polygraphy.backend.common import bytes_from_path
    from polygraphy.backend.trt import bytes_from_engine, engine_from_bytes

    logger = trt.Logger(trt.Logger.ERROR)
    built = engine_from_bytes(bytes_from_path(str(old)))
    refitter = trt.Refitter(built, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise BoostDiffError(f"{entry['flavour']} can't put the weights of {graph.name} into {old}: export anew")
    plan.write_bytes(bytes_from_engine(built))
    return entry | {"reason": f"refitted from a plan built by {entry['flavour']} {entry['version']}"}

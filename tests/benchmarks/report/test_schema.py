"""The published schema describes what is written; checked by hand, for want of a validator among the dependencies."""

import copy
import json
from pathlib import Path
from typing import Any

import boostdiff.benchmarks.bench
import pytest
from boostdiff.benchmarks.bench import SCHEMA_VERSION

SCHEMA = json.loads(Path(boostdiff.benchmarks.bench.__file__).with_name("report.schema.json").read_text())
TYPES: dict[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "null": type(None),
}
KNOWN = {"$schema", "$defs", "title", "description", "type", "properties", "required", "additionalProperties", "items"}
KNOWN |= {"const", "enum", "anyOf", "$ref", "minimum", "maximum", "minItems"}


def faults(value: Any, schema: dict[str, Any], where: str = "report") -> list[str]:
    """What is wrong with a value, by the keywords of JSON Schema that the schema uses."""
    assert schema.keys() <= KNOWN, schema.keys() - KNOWN
    if "$ref" in schema:
        return faults(value, SCHEMA["$defs"][schema["$ref"].removeprefix("#/$defs/")], where)
    if "anyOf" in schema:
        found = [faults(value, option, where) for option in schema["anyOf"]]
        return [] if [] in found else found[0]
    if "const" in schema or "enum" in schema:
        return [] if value in schema.get("enum", [schema.get("const")]) else [f"{where}: {value!r}"]
    names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if isinstance(value, bool) or not isinstance(value, tuple(TYPES[name] for name in names)):
        return [f"{where}: {value!r} is no {names}"]
    found = []
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        found.append(f"{where}: {value} is out of range")
    if isinstance(value, list):
        found += [f"{where} is too short"] * (len(value) < schema.get("minItems", 0))
        found += [f for i, item in enumerate(value) for f in faults(item, schema["items"], f"{where}[{i}]")]
    if isinstance(value, dict):
        found += [f"{where}.{name} is missing" for name in schema.get("required", ()) if name not in value]
        rest = schema.get("additionalProperties", True)
        for name, inner in value.items():
            known = schema.get("properties", {}).get(name, rest)
            if known is False:
                found.append(f"{where}.{name} is unknown")
            elif known is not True:
                found += faults(inner, known, f"{where}.{name}")
    return found


def test_reports_follow_the_schema(written_report: dict[str, Any]) -> None:
    assert faults(written_report, SCHEMA) == []
    assert faults(written_report | {"quality": None}, SCHEMA) == []
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), 1),
        (("speed", "rows", 0, "way"), "other"),
        (("speed", "rows", 0, "latency", "runs"), 0),
        (("speed", "rows", 0, "peak_share"), -0.1),
        (("speed", "peaks"), None),
        (("speed", "ratios", 0, "estimate", "low"), "1"),
        (("quality", "rows", 0, "recall"), 1.5),
        (("quality", "rows", 0, "new"), 1),
        (("provenance", "hashes"), None),
    ],
)
def test_the_schema_refuses_what_is_wrong(
    written_report: dict[str, Any], path: tuple[str | int, ...], value: Any
) -> None:
    report = copy.deepcopy(written_report)
    inner: Any = report
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert len(faults(report, SCHEMA)) == 1

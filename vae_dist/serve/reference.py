"""API.md, the reference of the HTTP interface, from the OpenAPI document: `python -m vae_dist.serve.reference`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vae_dist.serve.api import build_api

API_MD = Path(__file__).with_name("API.md")
_INTRODUCTION = """# The HTTP interface

Written by `python -m vae_dist.serve.reference` from the schemas; do not edit. Fields are OpenAPI's: `/openapi.json`.
Every body is JSON; unknown fields are refused. Where the service has keys, send `Authorization: Bearer KEY`.

With `"stream": true` the answer is server-sent events, each a line `data: {...}`; the last is `data: [DONE]`. The
pieces of a text make the whole, to the letter. A stream that fails ends with `event: error`, whose data has `detail`.

| status | meaning |
|---|---|
| 401 | no key, or one that is not known |
| 404 | no model of that name; the message lists them |
| 408 | the body does not arrive |
| 413 | the body is too large |
| 422 | the request cannot be answered as it is; `detail` says why |
| 429 | no room at present, or the key's rate is spent: `Retry-After` says when to ask again |
| 503 | the service is stopping, or a model is not ready |
| 504 | it took longer than the service's limit |
"""
_BOUNDS = {
    "minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below",
    "minLength": "length at least", "maxLength": "length at most", "minItems": "items: at least",
    "maxItems": "items: at most",
}  # fmt: skip


def render(document: dict[str, Any]) -> str:
    """The Markdown of an OpenAPI document."""
    schemas = document["components"]["schemas"]
    sections = [_INTRODUCTION]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            sections.append("\n".join(_endpoint(method, path, operation, schemas)))
    shown = [name for name in schemas if not name.endswith(("Request", "ValidationError", "Error_Model"))]
    answers = [f"### {name}\n\n{schemas[name].get('description', '')}\n\n{_fields(schemas[name])}" for name in shown]
    return "\n".join([*sections, "## Answers\n", "\n".join(answers)])


def _endpoint(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> Iterator[str]:
    yield f"## `{method.upper()} {path}`\n\n{operation['description']}\n"
    for parameter in operation.get("parameters", []):
        yield f"`?{parameter['name']}=` {_kind(parameter['schema'])}\n"
    example = None
    if "requestBody" in operation:
        schema = schemas[_reference(operation["requestBody"]["content"]["application/json"]["schema"])]
        example = schema["example"]
        yield _fields(schema)
    body = f" -H 'content-type: application/json' \\\n      -d '{json.dumps(example)}'" if example else ""
    yield f"    curl -s http://127.0.0.1:8000{path}{body}\n"
    for kind, content in operation["responses"]["200"].get("content", {}).items():
        if "$ref" in content.get("schema", {}):
            name = _reference(content["schema"])
            yield f"Answer ({kind}): [{name}](#{name.lower()})\n"


def _fields(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = [
        f"| `{name}` | {_kind(one)} | {'' if name in required else _default(one)} | {one.get('description', '')} |"
        for name, one in schema.get("properties", {}).items()
    ]
    return "\n".join(["| field | type | default | |", "|---|---|---|---|", *rows, ""])


def _default(field: dict[str, Any]) -> str:
    return f"`{json.dumps(field.get('default'))}`"


def _kind(field: dict[str, Any]) -> str:
    """A type in words, with its bounds."""
    if "$ref" in field:
        name = _reference(field)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_kind(one) for one in field["anyOf"])
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type", "any")
    if kind == "array" and "items" in field:
        kind = f"list of {_kind(field['items'])}"
    number = int if kind != "number" else float
    bounds = [f"{words} {number(field[key])}" for key, words in _BOUNDS.items() if key in field]
    return f"{kind} ({', '.join(bounds)})" if bounds else kind


def _reference(schema: dict[str, Any]) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


if __name__ == "__main__":
    API_MD.write_text(render(build_api().openapi()), encoding="utf-8")

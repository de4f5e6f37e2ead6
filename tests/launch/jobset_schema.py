"""Checks rendered JobSets against the schema of JobSet's own CRD, unknown fields refused.

    python -m launch.jobset ... --dry_run > jobset.yaml
    python -m tests.launch.jobset_schema CRD jobset.yaml [...]

CRD is the file config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml of github.com/kubernetes-sigs/jobset. Needs
`pip install jsonschema`.
"""

import sys
from typing import Any

import yaml

VERSION = "v1alpha2"


def schema(crd: str) -> dict[str, Any]:
    """Returns the schema of the version that is rendered, closed to fields that it does not name."""
    with open(crd) as file:
        versions = yaml.safe_load(file)["spec"]["versions"]
    (found,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == VERSION]
    _close(found)
    found["properties"]["metadata"] = {}
    return found


def _close(node: Any) -> None:
    if isinstance(node, dict):
        if "properties" in node and node.get("type") == "object":
            node.setdefault("additionalProperties", False)
        if node.get("x-kubernetes-int-or-string"):
            node.pop("type", None)
        for child in node.values():
            _close(child)
    elif isinstance(node, list):
        for child in node:
            _close(child)


def mistakes(crd: str, manifest: Any) -> list[str]:
    """Returns what the schema does not accept, one line each."""
    import jsonschema

    errors = jsonschema.Draft7Validator(schema(crd)).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}" for error in errors]


if __name__ == "__main__":
    found = {}
    for path in sys.argv[2:]:
        with open(path) as file:
            found[path] = mistakes(sys.argv[1], yaml.safe_load(file))
        print(f"{path}: {'; '.join(found[path]) or 'accepted'}")
    sys.exit(any(found.values()))

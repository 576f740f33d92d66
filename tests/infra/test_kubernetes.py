"""infra/kubernetes: Kubernetes and Prefect take it, and its parts fit together."""

import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import prefect
import pytest
import yaml
from prefect.utilities.schema_tools.validation import validate as validate_values
from prefect.utilities.templating import apply_values

DIRECTORY = Path(__file__).parents[2] / "infra/kubernetes"
TEMPLATE = json.loads((DIRECTORY / "work-pool.json").read_text())
MANIFESTS = {manifest["kind"]: manifest for manifest in yaml.safe_load_all((DIRECTORY / "workspace.yaml").read_text())}

# Prefect's worker insists on them in the pod, where Kubernetes has no such fields and drops them.
PREFECTS_OWN = ("completions", "parallelism")
# What the worker fills in itself.
FILLED_IN = {
    "name": "run",
    "namespace": "default",
    "labels": {"prefect.io/flow-run-name": "run"},
    "command": ["prefect", "flow-run", "execute"],
    "env": [{"name": "PREFECT__FLOW_RUN_ID", "value": "0"}],
    "image_pull_policy": "IfNotPresent",
}
ON_A_GPU = {
    "image": "registry/elastic-family:gpu",
    "gpus": 8,
    "memory_limit": "200Gi",
    "node_selector": {"pool": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
}
ON_A_CPU = {"image": "registry/elastic-family:cpu", "gpus": 0}


def prefects_template() -> dict[str, Any]:
    file = importlib.resources.files(prefect) / "server/api/collections_data/views/aggregate-worker-metadata.json"
    return json.loads(file.read_text())["prefect-kubernetes"]["kubernetes"]["default_base_job_configuration"]


def check(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def paths(value: Any, at: tuple[str | int, ...] = ()) -> set[tuple[str | int, ...]]:
    """Where every value of nested objects and lists is."""
    if isinstance(value, dict):
        return {at}.union(*(paths(inner, (*at, key)) for key, inner in value.items()))
    if isinstance(value, list):
        return {at}.union(*(paths(inner, (*at, index)) for index, inner in enumerate(value)))
    return {at}


def rendered(values: dict[str, Any]) -> dict[str, Any]:
    """The job that a run with these variables becomes."""
    manifest = apply_values(TEMPLATE["job_configuration"]["job_manifest"], FILLED_IN | values)
    for name in PREFECTS_OWN:
        del manifest["spec"]["template"]["spec"][name]
    return manifest


# The work pool


@pytest.mark.parametrize("values", [ON_A_CPU, ON_A_GPU], ids=["cpu", "gpu"])
def test_a_run_becomes_a_job_that_kubernetes_takes(values):
    check(rendered(values))


def test_a_job_has_its_gpus_shared_memory_and_the_workspace():
    pod = rendered(ON_A_GPU)["spec"]["template"]["spec"]
    container, volumes = pod["containers"][0], {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert container["resources"]["limits"] == {"memory": "200Gi", "nvidia.com/gpu": 8}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert mounts[MANIFESTS["ConfigMap"]["data"]["ELASTIC_HOME"]] == {
        "name": "workspace",
        "persistentVolumeClaim": {"claimName": MANIFESTS["PersistentVolumeClaim"]["metadata"]["name"]},
    }


@pytest.mark.parametrize("missing", ["image", "gpus"])
def test_a_run_that_does_not_say_its_image_or_gpus_is_refused(missing):
    values = {name: value for name, value in ON_A_GPU.items() if name != missing}
    (error,) = validate_values(values, TEMPLATE["variables"])
    assert missing in error.message


@pytest.mark.parametrize("gpus", [-1, "many"])
def test_a_number_of_gpus_that_is_none_is_refused(gpus):
    assert validate_values({**ON_A_GPU, "gpus": gpus}, TEMPLATE["variables"])


def test_the_template_has_every_part_of_prefects_own():
    own, ours = (t["job_configuration"] for t in (prefects_template(), TEMPLATE))
    assert paths(own) <= paths(ours)


def test_prefects_variables_are_as_prefect_has_them():
    own, ours = (t["variables"]["properties"] for t in (prefects_template(), TEMPLATE))
    assert ours.keys() - own.keys() == {"gpus", "node_selector", "tolerations"}
    assert {name for name in own if own[name] != ours[name]} == {"image"}


def test_every_placeholder_is_a_variable_and_every_variable_is_used():
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == set(TEMPLATE["variables"]["properties"])
    assert set(TEMPLATE["variables"]["required"]) <= used


# The manifests


@pytest.mark.parametrize("kind", MANIFESTS)
def test_kubernetes_takes_every_manifest(kind):
    check(MANIFESTS[kind])


def test_a_field_that_kubernetes_does_not_have_is_noticed():
    job = rendered(ON_A_GPU)
    with pytest.raises(kubernetes_validate.ValidationError, match="backofLimit"):
        check({**job, "spec": {**job["spec"], "backofLimit": 0}})


def test_pods_are_not_root_and_can_gain_no_rights():
    pod = rendered(ON_A_GPU)["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["containers"][0]["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_no_secret_is_written_down():
    assert "Secret" not in MANIFESTS
    assert not re.search(r"(?i)password|secret|access_key|://[^/]*@", json.dumps(MANIFESTS["ConfigMap"]["data"]))

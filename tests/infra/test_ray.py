"""infra/ray: Kubernetes takes every pod, Ray every option, and the run's pod finds the cluster and may enter it."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[2]
MANIFESTS = {
    manifest["kind"]: manifest
    for file in ("cluster.yaml", "run.yaml")
    for manifest in yaml.safe_load_all((ROOT / "infra/ray" / file).read_text())
}
CLUSTER, RUN, POLICY = MANIFESTS["RayCluster"], MANIFESTS["Job"], MANIFESTS["NetworkPolicy"]
GROUPS = [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]
TEMPLATES = {group.get("groupName", "head"): group["template"] for group in GROUPS} | {"run": RUN["spec"]["template"]}

# Of the fields that KubeRay's reference has of each, those that ours use: nothing here knows the others.
OF_A_CLUSTER = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
OF_A_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def check(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def options(line: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z-]+)=(\S+)", line))


@pytest.mark.parametrize("kind", sorted(MANIFESTS.keys() - {"RayCluster"}))
def test_kubernetes_takes_every_manifest(kind: str) -> None:
    check(MANIFESTS[kind])


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_pod_is_one_that_kubernetes_takes_and_that_can_gain_no_rights(name: str) -> None:
    pod = TEMPLATES[name]["spec"]
    check({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **TEMPLATES[name]["metadata"]}, "spec": pod})
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
    assert mounted == {volume["name"] for volume in pod.get("volumes", ())}


def test_the_cluster_has_fields_of_kuberay_alone_and_the_ray_of_the_images() -> None:
    assert CLUSTER["apiVersion"] == "ray.io/v1" and CLUSTER["spec"].keys() == OF_A_CLUSTER
    assert all(group.keys() <= OF_A_GROUP for group in GROUPS)
    assert f"ray=={CLUSTER['spec']['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    version = metadata.version("elastic-family")
    images = {template["spec"]["containers"][0]["image"] for template in TEMPLATES.values()}
    assert images == {f"elastic-family:{version}-{target}" for target in ("cpu", "gpu")}
    installed = re.findall(r'pip install .*"\.\[([\w,]+)\]"', (ROOT / "infra/Dockerfile").read_text())
    assert installed and all("ray" in extras.split(",") for extras in installed)


def test_only_the_clusters_own_pods_reach_it_and_they_need_its_token() -> None:
    label = POLICY["spec"]["podSelector"]["matchLabels"]
    assert all(label.items() <= template["metadata"]["labels"].items() for template in TEMPLATES.values())
    assert POLICY["spec"]["policyTypes"] == ["Ingress"]
    assert POLICY["spec"]["ingress"] == [{"from": [{"podSelector": {"matchLabels": label}}]}]
    assert CLUSTER["spec"]["authOptions"] == {"mode": "token"}
    variables = {variable["name"]: variable for variable in RUN["spec"]["template"]["spec"]["containers"][0]["env"]}
    token = variables["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert token == {"name": CLUSTER["metadata"]["name"], "key": "auth_token"}, "where KubeRay keeps it"
    assert variables["RAY_AUTH_MODE"]["value"] == "token"


def test_the_run_joins_the_cluster_and_gives_it_nothing() -> None:
    start, run = RUN["spec"]["template"]["spec"]["containers"][0]["command"][-1].split(" && ")
    assert options(start) == {
        "address": f"{CLUSTER['metadata']['name']}-head-svc:6379",  # the name that KubeRay gives the head's service
        "num-cpus": "0",
        "num-gpus": "0",
    }
    assert run.split() == ["exec", "elastic", "run", RUN["metadata"]["name"]]


def test_every_host_has_the_variables_and_shares_what_it_makes_through_the_store() -> None:
    shared = [kind["name"] for kind in (MANIFESTS["ConfigMap"]["metadata"], {"name": "elastic"})]
    for template in TEMPLATES.values():
        sources = [
            source.get("configMapRef", {}).get("name") for source in template["spec"]["containers"][0]["envFrom"]
        ]
        assert set(shared) <= set(sources) and sources[-1] == shared[0], "its home is not the other pods' disk"
    assert MANIFESTS["ConfigMap"]["data"]["ELASTIC_WORKSPACE"].startswith("s3://")
    readme = (ROOT / "infra/README.md").read_text()
    assert all(f"`{name}`" in readme for name in MANIFESTS["ConfigMap"]["data"])


def test_ray_has_the_options() -> None:
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--help"]
    asked = subprocess.run(command, capture_output=True, text=True)
    known = set(re.findall(r"--([a-z-]+)", asked.stdout))
    of_groups = {option for group in GROUPS for option in group["rayStartParams"]}
    assert of_groups | options(RUN["spec"]["template"]["spec"]["containers"][0]["command"][-1]).keys() <= known

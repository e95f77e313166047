"""The Kubernetes manifests of cluster/kuberay: every field exists, and what they promise of safety holds for each pod.

Schemas: KubeRay's custom resources (`kuberay/NOTICE`), Kubernetes' own for pods, metadata, storage and policies.
"""

from __future__ import annotations

import copy
import gzip
import importlib.metadata
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from support import ROOT

from vae_dist.config.load import load_config

KUBERAY = ROOT / "cluster/kuberay"
KUBERNETES = "1.34"
FILES = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml", "RayService": "rayservice.yaml"}


@pytest.fixture(scope="module", autouse=True)
def _read_once() -> Iterator[None]:
    """The published schema is 1.5 MB, and is asked a thousand times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
        yield


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


@pytest.fixture(params=FILES)
def manifest(request: pytest.FixtureRequest) -> dict[str, Any]:
    (one,) = documents(FILES[request.param])
    assert one["kind"] == request.param
    return one


def cluster_of(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def ray_pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = cluster_of(manifest)
    return [group["template"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    submitter = manifest["spec"].get("submitterPodTemplate")
    return ray_pods(manifest) + ([submitter] if submitter else [])


def check(manifest: dict[str, Any]) -> None:
    """Raises unless every field of a manifest is known and has the right type."""
    assert manifest["apiVersion"] == "ray.io/v1"
    jsonschema.Draft202012Validator(definitions()[manifest["kind"]]).validate(manifest)
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": manifest["metadata"]}, KUBERNETES, strict=True
    )
    for template in pods(manifest):
        whole = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        kubernetes_validate.validate(whole, KUBERNETES, strict=True)


@cache
def definitions() -> dict[str, dict[str, Any]]:
    """KubeRay's own schemas by kind, unknown fields refused."""
    packed = (Path(__file__).parent / "kuberay/crds-1.7.0.json.gz").read_bytes()
    return {kind: strict(schema) for kind, schema in json.loads(gzip.decompress(packed)).items()}


def strict(schema: Any) -> Any:
    """An OpenAPI schema of Kubernetes as a JSON Schema that refuses fields it does not list."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: strict(value) for key, value in schema.items()}
    if changed.get("x-kubernetes-int-or-string"):
        changed.pop("type", None)
    if isinstance(changed.get("properties"), dict) and not changed.get("x-kubernetes-preserve-unknown-fields"):
        changed["additionalProperties"] = False
    return changed


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every mapping whose keys are fields."""
    if isinstance(tree, dict):
        if path[-1:] not in (("labels",), ("matchLabels",), ("rayStartParams",), ("requests",), ("limits",)):
            yield path
        for key, value in tree.items():
            yield from paths(value, (*path, key))
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from paths(value, (*path, number))


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def test_every_field_is_known(manifest: dict[str, Any]) -> None:
    check(manifest)


def test_an_unknown_field_is_refused_wherever_it_stands(manifest: dict[str, Any]) -> None:
    # Anchors are one object in many places; a copy by way of text has one for each.
    manifest = yaml.safe_load(yaml.dump(manifest, Dumper=_NoAliases))
    everywhere = list(paths(manifest))
    assert len(everywhere) > 25
    for path in everywhere:
        damaged = copy.deepcopy(manifest)
        at(damaged, path)["tokne"] = "x"
        with pytest.raises(jsonschema.ValidationError):
            check(damaged)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def test_wrong_types_and_values_are_refused() -> None:
    (job,) = documents("rayjob.yaml")
    for path, wrong in (
        (("spec", "backoffLimit"), "5"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "open"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "terminationGracePeriodSeconds"), "4m"),
        (("spec", "submissionMode"), 3),
    ):
        damaged = copy.deepcopy(job)
        at(damaged, path[:-1])[path[-1]] = wrong
        with pytest.raises(jsonschema.ValidationError):
            check(damaged)


def test_names_leave_room_for_what_kuberay_adds_to_them(manifest: dict[str, Any]) -> None:
    # The schema cannot say it: a DNS label, of which 50 characters are the user's.
    assert re.fullmatch("[a-z]([-a-z0-9]{0,45}[a-z0-9])?", manifest["metadata"]["name"])


def test_storage_and_network_policy_are_kubernetes_own() -> None:
    claim, policy = documents("storage.yaml")
    for one in (claim, policy):
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"], "pods of several nodes write to it"
    # Whatever is not Serve's port is for our own pods and the operator.
    wanted = policy["spec"]["podSelector"]["matchLabels"].items()
    for name in FILES.values():
        for pod in pods(documents(name)[0]):
            assert wanted <= pod["metadata"]["labels"].items()
    for rule in policy["spec"]["ingress"]:
        assert rule.get("from") or [port["port"] for port in rule["ports"]] == [8000]


def test_token_authentication_and_one_version(manifest: dict[str, Any]) -> None:
    cluster = cluster_of(manifest)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == importlib.metadata.version("ray")
    images = {container["image"] for pod in pods(manifest) for container in pod["spec"]["containers"]}
    assert images == {f"registry.example.com/vae_dist:{importlib.metadata.version('vae_dist')}"}


def test_nothing_is_reachable_from_outside(manifest: dict[str, Any]) -> None:
    head = cluster_of(manifest)["headGroupSpec"]
    assert not {"serviceType", "enableIngress", "ingressOptions", "headService"} & head.keys()
    assert "dashboard-host" not in head["rayStartParams"]


def test_pods_are_nobody_special(manifest: dict[str, Any]) -> None:
    for pod in pods(manifest):
        person = pod["spec"]["securityContext"]
        assert person["runAsNonRoot"] is True and person["runAsUser"] == person["fsGroup"] == 1000
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        for container in pod["spec"]["containers"]:
            rights = container["securityContext"]
            assert rights == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_storage_outlives_the_pods_and_memory_is_shared(manifest: dict[str, Any]) -> None:
    claim = documents("storage.yaml")[0]["metadata"]["name"]
    for pod in ray_pods(manifest):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        (container,) = pod["spec"]["containers"]
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounted["/storage"]["persistentVolumeClaim"]["claimName"] == claim
        assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"


def test_each_grace_period_is_longer_than_what_happens_in_it(manifest: dict[str, Any]) -> None:
    """The pod's end waits for the drain, the drain for the save of a stopped job."""
    save = int(yaml.safe_load((ROOT / "cluster/runtime_env.yaml").read_text())["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    for pod in ray_pods(manifest):
        (container,) = pod["spec"]["containers"]
        environment = {one["name"]: one["value"] for one in container["env"]}
        drain = int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert save + 30 <= drain and drain + 30 <= pod["spec"]["terminationGracePeriodSeconds"]


def test_the_job_runs_what_the_readme_says(tmp_path: Path) -> None:
    (job,) = documents("rayjob.yaml")
    spec = job["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == yaml.safe_load((ROOT / "cluster/runtime_env.yaml").read_text())
    python, flag, module, *overrides = shlex.split(spec["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "vae_dist.train")
    config = load_config(None, overrides)
    # A retry is another cluster: it finds the run by its name, on the volume.
    assert config.run.storage == "/storage" and config.run.name and spec["backoffLimit"] > 0
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert config.cluster.workers == group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    # KubeRay's own rule, which the schema cannot say.
    assert spec["shutdownAfterJobFinishes"] or not spec["ttlSecondsAfterFinished"]


def test_the_service_deploys_our_application() -> None:
    from vae_dist.serve import app
    from vae_dist.serve.settings import ServiceConfig

    (service,) = documents("rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{app.__name__}:{app.build.__name__}"
    arguments = ServiceConfig.model_validate(application.args)
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert application.deployments == [], "one way to say it: args"
    assert arguments.threads and arguments.max_replicas * arguments.threads <= group["replicas"] * float(
        container["resources"]["limits"]["cpu"]
    )

"""`minitron deploy`: charts rendered by Helm, held to Kubernetes' schemas; Compose files parsed strictly."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from minitron_build.bundle.bundle import Bundle
from minitron_build.bundle.manifest import Manifest, digest_file
from minitron_build.deploy import deploy_command, deploy_helm
from minitron_build.deploy.deploy_command import check_output
from minitron_build.deploy.deploy_compose import PROBE_FILE, ComposeAccess, compose_text
from minitron_build.deploy.deploy_helm import (
    DASHBOARD_FILE,
    SCHEMA_FILE,
    TEMPLATES_DIR,
    VALUES_FILE,
    chart_values,
    with_comments,
)
from minitron_build.deploy.deployment import ENGINE_DIR, GIB, Access, Deployment, server_argv
from minitron_build.errors import CheckpointError, PlanError
from minitron_build.planning.versions import serving_container
from minitron_build.runtime.metrics import ENGINE_METRICS, HISTOGRAM, REQUEST_METRICS
from minitron_build.serving.triton_ranks import LAUNCHER_FLAGS

ENGINE_BYTES = 5_300_000_000
KUBERNETES_VERSIONS = ("1.25", "1.33")  # the oldest that the chart admits, and a recent one
FILES_DIR = TEMPLATES_DIR / "chart" / "files"
GOLDEN_DATA = Path(__file__).parents[1] / "golden" / "data"
EVERYTHING = {
    "tls": {"secretName": "triton-tls", "mutual": True},
    "auth": {"apiKeySecret": "callers", "adminKeySecret": "managers"},
    "grafana": {"enabled": True, "labels": {"team": "code"}},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "autoscaling": {"enabled": True},
    "service": {"http": True, "headless": True, "annotations": {"a": "b"}},
    "gpu": {"product": "NVIDIA-H100-80GB-HBM3"},
    "nodeSelector": {"pool": "gpu"},
    "affinity": {"nodeAffinity": {}},
    "image": {"pullSecrets": [{"name": "registry"}]},
    "runtimeClassName": "nvidia",
    "priorityClassName": "high",
    "podLabels": {"team": "code"},
    "podAnnotations": {"c": "d"},
    "security": {"readOnlyRootFilesystem": True},
    "extraArgs": ["--log-verbose=1"],
    "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
    "model": {"subPath": "hopper", "claim": {"storageClassName": "fast"}},
}
VALUE_SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": EVERYTHING,
    "existing claim": {"model": {"existingClaim": "bundles"}, "networkPolicy": {"enabled": False}},
    "host path": {"model": {"hostPath": "/srv/bundle", "checkFiles": False}, "gpu": {"selectBySm": False}},
    "plain liveness": {"probes": {"liveness": {"askModels": False}}, "rollout": {"maxSurge": "25%"}},
}

ADMIN_KEY, API_KEY = "$(MINITRON_ADMIN_KEY)", "$(MINITRON_API_KEY)"
ACCESS_OF = {
    "defaults": Access(ADMIN_KEY, http_address="127.0.0.1"),
    "everything": Access(ADMIN_KEY, API_KEY, tls=True, mutual=True),
}

MakeBundle = Callable[..., Bundle]
Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    """A bundle with engine files of a few bytes, of what the manifest says."""

    def make(name: str = "bundle", *, arch: str = "hopper", num_engines: int = 1, **plan: Any) -> Bundle:
        path = tmp_path / name
        engine_dir = path / ENGINE_DIR
        engine_dir.mkdir(parents=True)
        for rank in range(num_engines):
            (engine_dir / f"rank{rank}.engine").write_bytes(bytes(1000))
        write_engine_facts(engine_dir, plan)
        files = {str(file.relative_to(path)): digest_file(file) for file in path.rglob("*") if file.is_file()}
        limits = {"max_batch_size": 64, "max_input_len": 8192, "max_seq_len": 9216, "max_num_tokens": 8192}
        record = {"arch": arch, "sm": 90, "precision": "fp8", "kv_cache_dtype": "fp8", "limits": limits}
        record = record | {"tp_size": 1, "pp_size": 1} | plan
        gpu = {"name": "NVIDIA H100 80GB HBM3", "sm": 90}
        manifest = Manifest(arch, {"name": "minitron"}, record, {}, files, gpu=gpu)
        (path / "manifest.json").write_text(manifest.dump())
        return Bundle.load(path)

    return make


def write_engine_facts(engine_dir: Path, plan: dict[str, Any]) -> None:
    """What an engine says of itself, as large as the plan has it."""
    config = json.loads((GOLDEN_DATA / "resolved_build_90_fp8.json").read_text())["engine_config"]
    sizes = {name: plan.get(name, 1) for name in ("tp_size", "pp_size")}
    config["pretrained_config"]["mapping"] |= sizes | {"world_size": sizes["tp_size"] * sizes["pp_size"]}
    (engine_dir / "config.json").write_text(json.dumps(config))
    record = {"schema": 1, "plan_digest": "", "sm": 90, "gpu": None, "container": None, "argv": []}
    (engine_dir / "engine.json").write_text(json.dumps(record | {"versions": {}, "files": {}}))


def deployment(world_size: int = 1, **changes: Any) -> Deployment:
    fields: dict[str, Any] = {
        "arch": "hopper",
        "sm": 90,
        "gpu": "NVIDIA H100 80GB HBM3",
        "precision": "fp8",
        "world_size": world_size,
        "image": serving_container(),
        "max_batch_size": 64,
        "engine_bytes": ENGINE_BYTES,
        "bundle_bytes": ENGINE_BYTES + 20_000_000,
        "manifest_sha256": "ab" * 32,
    }
    return Deployment(**fields | changes)


def deploy(*words: object) -> int:
    parser = argparse.ArgumentParser()
    deploy_command.configure_parser(parser)
    return deploy_command.run(parser.parse_args([str(word) for word in words]))


# --- what a bundle asks for


def test_numbers_follow_from_the_engine() -> None:
    one, two = deployment(), deployment(world_size=2)
    assert one.start_s == 120 + 27  # 26.5 s at 200 MB/s
    assert (one.shm_bytes, two.shm_bytes) == (2 * GIB, 3 * GIB)
    assert one.host_memory_bytes == 8 * GIB + ENGINE_BYTES + 2 * GIB
    assert one.waiting_requests_per_replica == 16
    assert deployment(max_batch_size=1).waiting_requests_per_replica == 1


def test_bundle_gives_the_numbers(make_bundle: MakeBundle) -> None:
    bundle = make_bundle(num_engines=4, tp_size=2, pp_size=2, container="mirror/triton:26.06")
    found = Deployment.of(bundle)
    assert (found.world_size, found.sm, found.image) == (4, 90, "mirror/triton:26.06")
    assert found.gpu == "NVIDIA H100 80GB HBM3"
    facts = sum((bundle.path / ENGINE_DIR / name).stat().st_size for name in ("config.json", "engine.json"))
    assert (found.engine_bytes, found.bundle_bytes) == (4000, 4000 + facts)
    assert found.manifest_sha256 == digest_file(bundle.path / "manifest.json").sha256
    assert Deployment.of(make_bundle("plain")).image == serving_container()


def test_engine_lies_where_its_configuration_says() -> None:
    from minitron_build.repository.engine_model import ENGINE_PATH

    assert ENGINE_DIR == ENGINE_PATH


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        ({"arch": "cpu"}, "reference engine; expected a bundle with a TensorRT engine; .*minitron serve"),
        ({"tp_size": 2}, "rank1.engine is not in the manifest; expected the engines of 2"),
        ({"sm": None}, "sm in the plan is None; expected a whole number"),
        ({"tp_size": True}, "tp_size in the plan is True"),
        ({"limits": {}}, "max_batch_size in the plan is None"),
    ],
)
def test_bundle_that_cannot_be_deployed_is_refused(
    make_bundle: MakeBundle, tmp_path: Path, bundle: dict[str, Any], message: str
) -> None:
    path = make_bundle(**bundle).path
    with pytest.raises(PlanError, match=message):
        deploy(path, "--kubernetes", tmp_path / "chart")
    assert not (tmp_path / "chart").exists()


# --- the command


def test_chart_is_written_and_announced(
    make_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, chart = make_bundle(), tmp_path / "new" / "chart"
    assert deploy(bundle.path, "--kubernetes", chart) == 0
    out = capsys.readouterr().out
    assert "helm upgrade --install minitron" in out
    document = json.loads(out.splitlines()[-1])
    assert document["kubernetes"] == str(chart)
    assert document["manifest_sha256"] == digest_file(bundle.path / "manifest.json").sha256
    names = {path.relative_to(chart).as_posix() for path in chart.rglob("*") if path.is_file()}
    assert {"Chart.yaml", "values.yaml", "values.schema.json", "templates/NOTES.txt"} <= names
    assert [path.name for path in chart.parent.iterdir()] == ["chart"]
    for path in chart.rglob("*"):
        assert not path.is_file() or str(tmp_path) not in path.read_text()


def test_one_form_must_be_asked_for(make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_bundle().path
    for words in ((), ("--kubernetes", "a", "--compose", "b")):
        with pytest.raises(SystemExit) as stop:
            deploy(path, *words)
        assert stop.value.code == 2
    assert "--compose" in capsys.readouterr().err


def test_changed_bundle_is_refused(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle()
    (bundle.path / ENGINE_DIR / "rank0.engine").write_bytes(b"y" * 1000)
    with pytest.raises(CheckpointError, match="rank0.engine: other bytes than when it was built"):
        deploy(bundle.path, "--kubernetes", tmp_path / "chart")
    assert not (tmp_path / "chart").exists()
    assert deploy(bundle.path, "--kubernetes", tmp_path / "chart", "--skip-hashes") == 0


def test_existing_output_needs_force(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle = make_bundle()
    for flag, output in (("--kubernetes", tmp_path / "chart"), ("--compose", tmp_path / "compose.yaml")):
        deploy(bundle.path, flag, output)
        with pytest.raises(CheckpointError, match="is there already; .*--force"):
            deploy(bundle.path, flag, output)
        assert deploy(bundle.path, flag, output, "--force") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bundle",
        "chart",
        "compose-grafana.json",
        "compose.yaml",
    ]


def test_replaced_chart_keeps_nothing_of_the_old_one(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle, chart = make_bundle(), tmp_path / "chart"
    deploy(bundle.path, "--kubernetes", chart)
    (chart / "templates" / "old.yaml").write_text("old")
    deploy(bundle.path, "--kubernetes", chart, "--force")
    assert not (chart / "templates" / "old.yaml").exists()


def test_foreign_folder_is_never_replaced(make_bundle: MakeBundle, tmp_path: Path) -> None:
    bundle, home = make_bundle(), tmp_path / "home"
    home.mkdir()
    assert deploy(bundle.path, "--kubernetes", home) == 0, "an empty folder is as good as a new one"
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    for output, is_chart, message in (
        (foreign, True, "a folder that holds no chart; expected a new or empty folder"),
        (foreign / "thesis.tex", True, "a file; expected a folder"),
        (foreign, False, "a folder; expected a file"),
        (bundle.path / "chart", True, "lies in the bundle"),
        (bundle.path / "compose.yaml", False, "lies in the bundle"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_output(output, bundle.path, is_chart=is_chart, force=True)


@pytest.mark.parametrize("is_there", [False, True])
def test_interrupted_write_leaves_what_was_there(
    make_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    bundle, chart = make_bundle(), tmp_path / "out" / "chart"
    if is_there:
        deploy(bundle.path, "--kubernetes", chart)
    before = {path: path.read_bytes() for path in chart.rglob("*") if path.is_file()}

    def killed(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(deploy_helm, "with_comments", killed)
    with pytest.raises(KeyboardInterrupt):
        deploy(bundle.path, "--kubernetes", chart, "--force")
    assert {path: path.read_bytes() for path in chart.rglob("*") if path.is_file()} == before
    assert [path.name for path in chart.parent.iterdir()] == (["chart"] if is_there else [])


# --- the chart


@pytest.fixture(scope="module")
def helm() -> Any:
    return pytest.importorskip("helm_python", reason="helm-python-sdk, Helm as a library, is not installed")


@pytest.fixture
def write_chart(tmp_path: Path) -> Callable[[int], Path]:
    def write(world_size: int = 1) -> Path:
        chart = tmp_path / f"chart{world_size}"
        deploy_command.write_chart_dir(deployment(world_size), chart)
        return chart

    return write


@pytest.fixture
def render(helm: Any, write_chart: Callable[[int], Path]) -> Render:
    """Manifests of a release named `prod`, by Helm."""

    def render(values: dict[str, Any] | None = None, world_size: int = 1) -> list[dict[str, Any]]:
        with helm.Chart.load(write_chart(world_size)) as chart:
            files = chart.render(values or {}, name="prod", namespace="llm")
        texts = [text for name, text in files.items() if name.endswith(".yaml")]
        return [document for text in texts for document in yaml.safe_load_all(text) if document]

    return render


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def pod_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    return dict(of_kind(manifests, "Deployment")["spec"]["template"]["spec"])


def triton_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    (container,) = pod_of(manifests)["containers"]
    return dict(container)


def test_helm_lints_the_chart(helm: Any, write_chart: Callable[[int], Path]) -> None:
    for values in VALUE_SETS.values():
        report = helm.lint(write_chart(1), values, strict=True)
        assert not report["errors"]
        assert [found["error"] for found in report["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", VALUE_SETS)
def test_manifests_are_valid(render: Render, name: str, world_size: int) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    manifests = render(VALUE_SETS[name], world_size)
    for manifest in manifests:
        if manifest["kind"] != "PodMonitor":  # the operator's, not Kubernetes' own: see the test of it
            for version in KUBERNETES_VERSIONS:
                kubernetes.validate(manifest, version, strict=True)
    kinds = {manifest["kind"] for manifest in manifests}
    assert {"Deployment", "Service", "ConfigMap"} <= kinds
    extra = {"PodMonitor", "HorizontalPodAutoscaler", "NetworkPolicy", "PersistentVolumeClaim"}
    assert extra <= kinds or name != "everything"


@pytest.mark.parametrize("name", ACCESS_OF)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_chart_runs_the_command_of_the_engine(render: Render, world_size: int, name: str) -> None:
    triton = triton_of(render(VALUE_SETS[name], world_size))
    extra = VALUE_SETS[name].get("extraArgs", [])
    ranks = " ".join(server_argv(world_size, ACCESS_OF[name])).split(" : ")
    assert triton["args"] == " : ".join(" ".join([rank, *extra]) for rank in ranks).split()
    assert "command" not in triton, "the image's entrypoint must run"
    assert triton["workingDir"] == "/bundle"
    assert triton["resources"]["limits"]["nvidia.com/gpu"] == str(world_size)
    assert triton["args"].count("--load-model=tensorrt_llm") == world_size - 1
    assert triton["args"].count("--load-model=*") == 1
    assert ("mpirun" in triton["args"]) == (world_size > 1)


def test_ranks_in_a_container_are_launched_as_serve_does(render: Render) -> None:
    args = triton_of(render(world_size=2))["args"]
    assert tuple(args[1 : 1 + len(LAUNCHER_FLAGS)]) == LAUNCHER_FLAGS


def test_keys_come_from_secrets_and_reach_server_and_probes(render: Render) -> None:
    open_pod, closed_pod = triton_of(render()), triton_of(render(EVERYTHING))
    env = {entry["name"]: entry for entry in closed_pod["env"]}
    for variable, secret in (("MINITRON_API_KEY", "callers"), ("MINITRON_ADMIN_KEY", "managers")):
        assert env[variable]["valueFrom"] == {"secretKeyRef": {"name": secret, "key": "key"}}
        assert any(f"=$({variable})" in word for word in closed_pod["args"])
    env = {entry["name"]: entry for entry in open_pod["env"]}
    assert "MINITRON_API_KEY" not in env
    assert env["MINITRON_ADMIN_KEY"]["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert not any("inference" in word for word in open_pod["args"])


def test_http_listens_in_the_pod_only_unless_it_is_offered(render: Render) -> None:
    for values, is_offered in (({}, False), ({"service": {"http": True}}, True)):
        triton = triton_of(render(values))
        assert ("--http-address=127.0.0.1" in triton["args"]) is not is_offered
        assert ("http" in {port["name"] for port in triton["ports"]}) is is_offered
        assert "--metrics-address=0.0.0.0" in triton["args"]
        for name in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert triton[name]["exec"]["command"][:2] == ["python3", "/deploy/probe.py"]


def test_chart_is_bound_to_engine_and_image(render: Render) -> None:
    manifests = render()
    pod, triton = pod_of(manifests), triton_of(manifests)
    assert pod["nodeSelector"]["nvidia.com/gpu.compute.major"] == "9"
    assert pod["nodeSelector"]["nvidia.com/gpu.compute.minor"] == "0"
    (check,) = pod["initContainers"]
    assert check["command"][-1] == "ab" * 32
    assert triton["image"] == check["image"] == serving_container()
    (shm,) = (volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert triton["resources"]["limits"]["memory"] == "15Gi"
    assert pod["securityContext"]["runAsNonRoot"] is True


def test_notes_say_how_to_call_it(helm: Any, write_chart: Callable[[int], Path]) -> None:
    with helm.Chart.load(write_chart(1)) as chart:
        files = chart.render({"autoscaling": {"enabled": True}}, name="prod", namespace="llm")
    notes = files["minitron/templates/NOTES.txt"]
    for words in (
        "--set gpu.product=NVIDIA-H100-80GB-HBM3",
        "kubectl -n llm cp BUNDLE/. prod-minitron-copy:/bundle",
        "minitron generate 'def add(a, b):' --url 127.0.0.1:8001 --stream",
        "triton_grpc_error",
        "pods/*/minitron_waiting_requests",
    ):
        assert words in notes


def test_startup_waits_for_the_engine_to_be_read(render: Render) -> None:
    for values, seconds in (({}, 147), ({"probes": {"startup": {"readBytesPerSecond": 10_000_000}}}, 650)):
        manifests = render(values)
        probe = triton_of(manifests)["startupProbe"]
        assert probe["exec"]["command"] == ["python3", "/deploy/probe.py", "start"]
        assert seconds <= probe["failureThreshold"] * probe["periodSeconds"] < seconds + 10
        assert of_kind(manifests, "Deployment")["spec"]["progressDeadlineSeconds"] > seconds


@pytest.mark.parametrize("world_size", [1, 2])
def test_pod_has_time_to_drain(render: Render, world_size: int) -> None:
    manifests = render({"drainSeconds": 600}, world_size)
    assert pod_of(manifests)["terminationGracePeriodSeconds"] == 630
    triton = triton_of(manifests)
    assert "--exit-timeout-secs=600" in triton["args"]
    before_stop = triton["lifecycle"]["preStop"]["exec"]["command"]
    assert before_stop[-1] == ("5" if world_size == 1 else "600"), "mpirun ends all ranks at once"


def test_names_agree(render: Render) -> None:
    """What one manifest calls by name, another one has."""
    manifests = render(EVERYTHING)
    pods = of_kind(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    ports = {port["name"]: port["containerPort"] for port in triton_of(manifests)["ports"]}
    service, policy = of_kind(manifests, "Service")["spec"], of_kind(manifests, "NetworkPolicy")["spec"]
    monitor = of_kind(manifests, "PodMonitor")["spec"]
    for selector in (
        service["selector"],
        policy["podSelector"]["matchLabels"],
        monitor["selector"]["matchLabels"],
        of_kind(manifests, "Deployment")["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= pods
    assert all(ports[port["targetPort"]] == port["port"] for port in service["ports"])
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == set(ports)
    target = of_kind(manifests, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["name"] == of_kind(manifests, "Deployment")["metadata"]["name"]
    claim = of_kind(manifests, "PersistentVolumeClaim")["metadata"]["name"]
    maps = {manifest["metadata"]["name"] for manifest in manifests if manifest["kind"] == "ConfigMap"}
    assert maps == {"prod-minitron-scripts", "prod-minitron-dashboard"}
    volumes = {volume["name"]: volume for volume in pod_of(manifests)["volumes"]}
    assert volumes["bundle"]["persistentVolumeClaim"]["claimName"] == claim
    assert volumes["scripts"]["configMap"]["name"] in maps
    assert {mount["name"] for mount in triton_of(manifests)["volumeMounts"]} == volumes.keys()


def test_pod_monitor_reads_the_metrics_port(render: Render) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads((GOLDEN_DATA / "pod_monitor_schema.json").read_text())
    monitor = of_kind(render(EVERYTHING), "PodMonitor")
    jsonschema.validate(monitor, schema)
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint == {"port": "metrics", "path": "/metrics", "interval": "15s"}
    for wrong in ({"interval": "15 s"}, {"prot": "metrics"}, {"scheme": "gopher"}):
        broken = {**monitor, "spec": {**monitor["spec"], "podMetricsEndpoints": [{**endpoint, **wrong}]}}
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, schema)


def test_autoscaler_follows_the_metric_that_the_adapter_makes(render: Render) -> None:
    manifests = render({"autoscaling": {"enabled": True, "maxReplicas": 8}})
    assert "replicas" not in of_kind(manifests, "Deployment")["spec"], "the autoscaler owns it"
    spec = of_kind(manifests, "HorizontalPodAutoscaler")["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 8)
    (metric,) = spec["metrics"]
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "16"}
    adapter = yaml.safe_load((TEMPLATES_DIR / "chart" / "prometheus-adapter-values.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]


def test_scripts_reach_the_pod_unchanged(render: Render) -> None:
    scripts = of_kind(render(), "ConfigMap")["data"]
    for name in ("probe.py", "check_bundle.py"):
        assert scripts[name].strip() == (FILES_DIR / name).read_text().strip()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replica": 2}, "replica"),
        ({"model": {"existingClaims": "x"}}, "existingClaims"),
        ({"engine": {"worldSize": 0}}, "worldSize"),
        ({"model": {"manifestSha256": "latest"}}, "manifestSha256"),
        ({"service": {"type": "Cluster"}}, "service"),
        (
            {"auth": {"apiKeySecret": "a", "adminKeySecret": "a"}},
            "auth.apiKeySecret is also auth.adminKeySecret",
        ),
        ({"tls": {"mutual": True}}, "tls.mutual is set without tls.secretName"),
        ({"model": {"existingClaim": "a", "hostPath": "/b"}}, "are both set"),
    ],
)
def test_wrong_value_is_refused(helm: Any, render: Render, values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmError, match=message):
        render(values)


def test_every_value_is_documented(write_chart: Callable[[int], Path]) -> None:
    chart = write_chart(1)
    text = (chart / VALUES_FILE).read_text()
    values = chart_values(deployment())
    assert yaml.safe_load(text) == values
    schema = json.loads((chart / SCHEMA_FILE).read_text())
    assert not [path for path in leaves(values, schema)]
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line or line.lstrip().startswith(("#", "-")) or lines[number - 1].lstrip().startswith("- "):
            continue
        if "  operator:" in line or "  effect:" in line:  # inside the one toleration
            continue
        assert lines[number - 1].lstrip().startswith("#"), f"no comment above {line!r}"


def leaves(values: dict[str, Any], schema: dict[str, Any]) -> Iterator[str]:
    """Paths that the schema does not describe."""
    for key, value in values.items():
        entry = schema["properties"].get(key, {})
        if not entry.get("description"):
            yield key
        if isinstance(value, dict) and "properties" in entry:
            yield from (f"{key}.{path}" for path in leaves(value, entry))


def test_comments_stand_above_their_keys() -> None:
    schema = {"properties": {"a": {"description": "A", "properties": {"b": {"description": "B"}}}}}
    assert with_comments("x: 1\na:\n  b: 2\n", schema) == "x: 1\n\n# A\na:\n  # B\n  b: 2\n"


# --- the Compose file


@pytest.mark.parametrize("world_size", [1, 2])
def test_compose_file_is_valid(tmp_path: Path, world_size: int) -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    text = compose_text(deployment(world_size), tmp_path / "bundles" / "hopper", tmp_path)
    assert compose_spec.PyCompose.from_yaml(text).service_names() == ["triton"]
    with pytest.raises(ValueError, match="shm_sise"):
        compose_spec.PyCompose.from_yaml(text.replace("shm_size", "shm_sise"))


def test_compose_file_serves_the_engine(tmp_path: Path) -> None:
    text = compose_text(deployment(2), tmp_path / "bundles" / "hopper", tmp_path / "deploy")
    service = yaml.safe_load(text)["services"]["triton"]
    closed = next(word for word in service["command"] if "minitron-admin-key" in word).rpartition(
        "minitron-admin-key="
    )[2]
    assert service["command"] == server_argv(2, Access(closed))
    assert re.fullmatch(r"\$\{MINITRON_ADMIN_KEY:-[\w-]{32}\}", closed), "a key that nobody knows"
    assert "MINITRON_API_KEY" not in service["environment"]
    assert service["image"] == serving_container()
    assert service["working_dir"] == "/bundle"
    assert service["volumes"][0]["source"] == "../bundles/hopper"
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    (gpus,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert gpus == {"driver": "nvidia", "count": 2, "capabilities": ["gpu"]}
    assert service["shm_size"] == str(3 * GIB)
    assert service["healthcheck"]["start_period"] == "147s"


def test_compose_file_is_not_interpolated(tmp_path: Path) -> None:
    text = compose_text(deployment(), tmp_path / "a $HOME", tmp_path)
    service = yaml.safe_load(text)["services"]["triton"]
    assert service["volumes"][0]["source"] == "./a $$HOME"
    *command, script, mode = service["healthcheck"]["test"]
    assert (command, mode) == (["CMD", "python3", "-c"], "ready")
    assert script.replace("$$", "$") == PROBE_FILE.read_text()


def test_compose_file_asks_for_a_key_and_speaks_tls(make_bundle: MakeBundle, tmp_path: Path) -> None:
    compose_spec = pytest.importorskip("compose_spec", reason="compose-spec is not installed")
    bundle, tls_dir, output = make_bundle(), tmp_path / "tls", tmp_path / "compose.yaml"
    tls_dir.mkdir()
    words = [bundle.path, "--compose", output, "--api-key", "--tls", tls_dir]
    with pytest.raises(PlanError, match="--tls: no tls.crt"):
        deploy(*words)
    assert not output.exists()
    for name in ("tls.crt", "tls.key"):
        (tls_dir / name).touch()
    deploy(*words)
    compose_spec.PyCompose.from_yaml(output.read_text())
    service = yaml.safe_load(output.read_text())["services"]["triton"]
    key = "${MINITRON_API_KEY:?set the key that callers must send}"
    assert service["environment"]["MINITRON_API_KEY"] == key, "the health check sends it"
    assert (
        f"--grpc-restricted-protocol=inference,model-config,statistics:minitron-key={key}"
        in service["command"]
    )
    assert "--grpc-server-key=/tls/tls.key" in service["command"]
    assert "--grpc-use-ssl-mutual=1" not in service["command"]
    assert {"type": "bind", "source": "./tls", "target": "/tls", "read_only": True} in service["volumes"]
    (tls_dir / "ca.crt").touch()
    text = compose_text(deployment(), tmp_path / "b", tmp_path, ComposeAccess(tls_dir=tls_dir))
    assert "--grpc-root-cert=/tls/ca.crt" in yaml.safe_load(text)["services"]["triton"]["command"]
    with pytest.raises(PlanError, match="--api-key and --tls are for --compose; .*auth.apiKeySecret"):
        deploy(bundle.path, "--kubernetes", tmp_path / "chart", "--api-key")


# --- the dashboard

GPU_METRICS = {
    "nv_trt_llm_request_metrics",
    "nv_trt_llm_kv_cache_block_metrics",
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
}
"""Triton's and TensorRT-LLM's own, on a GPU only."""


def exported_metrics() -> set[str]:
    return {
        f"{info.name}{part}"
        for info in (*REQUEST_METRICS, *ENGINE_METRICS)
        for part in (("_bucket", "_sum", "_count") if info.kind == HISTOGRAM else ("",))
    }


def metrics_asked_for(dashboard: dict[str, Any]) -> set[str]:
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    queries += [var["definition"] for var in dashboard["templating"]["list"] if "definition" in var]
    return {name for query in queries for name in re.findall(r"\b(?:minitron|nv)_\w+", query)}


def test_dashboard_asks_for_metrics_that_exist_and_for_all_of_ours() -> None:
    asked = metrics_asked_for(json.loads(DASHBOARD_FILE.read_text()))
    assert asked <= exported_metrics() | GPU_METRICS
    families = {info.name for info in (*REQUEST_METRICS, *ENGINE_METRICS)}
    unseen = {name for name in families if not any(metric.startswith(name) for metric in asked)}
    assert unseen == set()


def test_dashboard_is_one_that_grafana_takes() -> None:
    dashboard = json.loads(DASHBOARD_FILE.read_text())
    assert dashboard["title"]
    assert dashboard["schemaVersion"] >= 36
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in own) < 24
        assert not own & cells, f"{panel['title']} lies on another panel"
        cells |= own
        if panel["type"] == "row":
            continue
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            is_counter = "_total{" in target["expr"] or "_bucket{" in target["expr"]
            assert is_counter == ("rate(" in target["expr"])


def test_dashboard_reaches_both_outputs(render: Render, make_bundle: MakeBundle, tmp_path: Path) -> None:
    (in_chart,) = (
        manifest["data"]["minitron.json"]
        for manifest in render({"grafana": {"enabled": True}})
        if manifest["kind"] == "ConfigMap" and "dashboard" in manifest["metadata"]["name"]
    )
    assert json.loads(in_chart) == json.loads(DASHBOARD_FILE.read_text())
    deploy(make_bundle().path, "--compose", tmp_path / "minitron.yaml")
    assert (tmp_path / "minitron-grafana.json").read_text() == DASHBOARD_FILE.read_text()


# --- what runs in the container


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FILES_DIR / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bundle_is_checked_before_the_start(
    make_bundle: MakeBundle, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bundle, check = make_bundle(), load_script("check_bundle")
    sha256 = Deployment.of(bundle).manifest_sha256
    engine = bundle.path / ENGINE_DIR / "rank0.engine"
    assert check.main(["", str(bundle.path), sha256]) == 0
    assert check.main(["", str(bundle.path), "00" * 32]) == 1
    assert "is of another bundle" in capsys.readouterr().err
    engine.write_bytes(b"z" * 1000)
    assert check.main(["", str(bundle.path), sha256]) == 1
    assert "rank0.engine has other bytes" in capsys.readouterr().err
    engine.unlink()
    assert check.main(["", str(bundle.path), sha256]) == 1
    assert "rank0.engine is missing" in capsys.readouterr().err
    assert check.main(["", str(tmp_path / "empty"), sha256]) == 1
    assert "holds no manifest.json: copy the bundle" in capsys.readouterr().err
    assert check.main([""]) == 2


class Answers(BaseHTTPRequestHandler):
    """A server that says what a test tells it to; the last answer stays."""

    answers: list[tuple[int, str]]
    delay_s = 0.0
    keys: list[str | None] = []  # noqa: RUF012  # shared on purpose: a handler lives for one request

    def do_GET(self) -> None:
        status, body = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        time.sleep(self.delay_s)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.keys.append(self.headers["minitron-key"])
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Run the probe against a server that gives these answers."""
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    module = load_script("probe")
    for name in ("PROBE_HTTP_PORT", "PROBE_METRICS_PORT"):
        monkeypatch.setenv(name, str(server.server_port))
    monkeypatch.setattr(module, "LEAVE_S", 0.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def run(*words: str, answers: list[tuple[int, str]], delay_s: float = 0.0) -> int:
        monkeypatch.setattr(module, "TIMEOUT_S", 0.2 if delay_s else 20.0)
        Answers.answers, Answers.delay_s = answers, delay_s
        return int(module.main(["probe.py", *words]))

    yield run
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "has_started", "is_alive"),
    [
        (200, '{"text_output":"def add(a, b):\\n"}', True, True),
        (200, '{"error":"INTERNAL: the engine failed"}', False, False),
        (400, '{"error":"Stub process \'tensorrt_llm_bls_0_0\' is not healthy."}', False, False),
        (503, '{"error":"UNAVAILABLE: Stub process \'tensorrt_llm_0_0\' is not healthy."}', False, False),
        (503, '{"error":"UNAVAILABLE: model tensorrt_llm is gone (refused)"}', False, False),
        (503, '{"error":"UNAVAILABLE: 1024 requests wait"}', False, True),
        (404, "", False, False),
    ],
)
def test_probe_judges_an_answer(
    probe: Callable[..., int], status: int, body: str, has_started: bool, is_alive: bool
) -> None:
    assert probe("start", answers=[(status, body)]) == (0 if has_started else 1)
    assert probe("alive", answers=[(status, body)]) == (0 if is_alive else 1)


TOKEN, FULL = (200, '{"text_output":"def"}'), (503, '{"error":"UNAVAILABLE: 1024 requests wait"}')


def counters(tokens: int, steps: int) -> tuple[int, str]:
    ours = f'minitron_output_tokens_total{{model="tensorrt_llm_bls"}} {tokens}'
    theirs = f'nv_trt_llm_general_metrics{{general_type="iteration_counter",model="tensorrt_llm"}} {steps}'
    return 200, f"{ours}\n{theirs}\nother 1\n"


@pytest.mark.parametrize(
    ("before", "after", "answer", "is_ready"),
    [
        (counters(1, 1), counters(2, 1), FULL, True),  # others get tokens: nothing is asked
        (counters(1, 1), counters(1, 2), FULL, True),
        (counters(1, 1), counters(1, 1), TOKEN, True),  # idle
        (counters(1, 1), counters(1, 1), FULL, False),  # full, and nothing moves
        (counters(1, 1), (500, ""), TOKEN, True),  # without metrics the token counts
        ((500, ""), (500, ""), FULL, False),
        ((200, "other 1"), (200, "other 2"), FULL, False),
    ],
)
def test_probe_is_ready_while_tokens_come(
    probe: Callable[..., int],
    before: tuple[int, str],
    after: tuple[int, str],
    answer: tuple[int, str],
    is_ready: bool,
) -> None:
    assert probe("ready", answers=[before, TOKEN]) == 0, "the first call asks"
    assert probe("ready", answers=[after, answer]) == (0 if is_ready else 1)


@pytest.mark.parametrize(
    ("before", "after", "answer", "is_alive"),
    [
        (counters(1, 1), counters(2, 2), FULL, True),  # busy with others
        (counters(1, 1), counters(1, 1), FULL, False),  # hung: a restart is due
        (counters(1, 1), counters(1, 1), TOKEN, True),
        (counters(1, 1), (500, ""), FULL, True),  # without metrics nothing is known
    ],
)
def test_probe_takes_a_server_that_hangs_for_dead(
    probe: Callable[..., int],
    before: tuple[int, str],
    after: tuple[int, str],
    answer: tuple[int, str],
    is_alive: bool,
) -> None:
    assert probe("alive", answers=[before, FULL]) == 0, "the first call has nothing to compare with"
    assert probe("alive", answers=[after, answer]) == (0 if is_alive else 1)


def test_probe_is_not_ready_when_no_token_comes_in_time(probe: Callable[..., int]) -> None:
    assert probe("ready", answers=[counters(1, 1)], delay_s=0.5) == 1


def test_probe_asks_triton_itself_whether_it_lives(probe: Callable[..., int]) -> None:
    assert probe("live", answers=[(200, "")]) == 0
    assert probe("live", answers=[(400, "")]) == 1


def test_probe_sends_the_key(probe: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINITRON_API_KEY", "the-key")
    assert probe("start", answers=[TOKEN]) == 0
    assert Answers.keys[-1] == "the-key"
    monkeypatch.delenv("MINITRON_API_KEY")
    assert probe("start", answers=[TOKEN]) == 0
    assert Answers.keys[-1] is None


def test_probe_takes_a_busy_server_for_alive(
    probe: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe("alive", answers=[(200, "")], delay_s=0.5) == 0
    assert probe("start", answers=[(200, "")], delay_s=0.5) == 1
    assert "no answer in 0.2 s" in capsys.readouterr().err


def test_probe_fails_where_nobody_listens(
    probe: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROBE_HTTP_PORT", "1")
    for mode in ("start", "alive"):
        assert probe(mode, answers=[(200, "")]) == 1
        assert "refused" in capsys.readouterr().err
    monkeypatch.setenv("PROBE_METRICS_PORT", "1")
    assert probe("drain", "5", answers=[(200, "")]) == 0
    assert probe("drain", answers=[(200, "")]) == 2


def test_probe_waits_until_the_engine_is_idle(probe: Callable[..., int]) -> None:
    def metrics(active: int, waiting: int) -> tuple[int, str]:
        lines = (("active", active), ("waiting", waiting), ("max", 64))
        family = 'nv_trt_llm_request_metrics{model="tensorrt_llm",request_type='
        return 200, "".join(f'{family}"{kind}",version="1"}} {count}\n' for kind, count in lines)

    start_s = time.monotonic()
    assert probe("drain", "60", answers=[metrics(3, 1), metrics(0, 0)]) == 0
    assert 1 <= time.monotonic() - start_s < 10
    start_s = time.monotonic()
    assert probe("drain", "2", answers=[metrics(1, 0)]) == 0
    assert 2 <= time.monotonic() - start_s < 10

"""The Helm chart of a bundle: committed templates, and values that this bundle asks for.

The templates are real files; only Chart.yaml and values.yaml are made here, through PyYAML, and each value is
documented by the description that the chart's own schema gives it. What the numbers are is deployment.py's.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minitron_build import __version__
from minitron_build.deploy.deployment import (
    DRAIN_S,
    PROBE_PERIOD_S,
    READ_BYTES_PER_S,
    START_BASE_S,
    Deployment,
    gibibytes,
)
from minitron_build.planning.versions import PIN

CHART_NAME = "minitron"
CHART_FILE, VALUES_FILE, SCHEMA_FILE = "Chart.yaml", "values.yaml", "values.schema.json"
TEMPLATES_DIR = Path(__file__).parent / "templates"
DASHBOARD_FILE = TEMPLATES_DIR / "chart" / "files" / "grafana-dashboard.json"
METRIC = "minitron_waiting_requests"
COMMENT_WIDTH = 100


def write_chart(deployment: Deployment, output_dir: Path) -> None:
    """Write the chart.

    Args:
        output_dir: a folder that does not exist yet.
    """
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(TEMPLATES_DIR / "chart", output_dir, ignore=ignored)
    schema = json.loads((output_dir / SCHEMA_FILE).read_text(encoding="utf-8"))
    (output_dir / CHART_FILE).write_text(_dump(chart_metadata(deployment)), encoding="utf-8")
    (output_dir / VALUES_FILE).write_text(
        with_comments(_dump(chart_values(deployment)), schema), encoding="utf-8"
    )


def chart_metadata(deployment: Deployment) -> dict[str, Any]:
    """What `Chart.yaml` says."""
    return {
        "apiVersion": "v2",
        "name": CHART_NAME,
        "description": (
            f"Llama-3.1-Minitron-4B on Triton with a TensorRT-LLM {deployment.precision} engine "
            f"for {deployment.arch} (SM {deployment.sm})"
        ),
        "type": "application",
        "version": __version__,
        "appVersion": PIN.tensorrt_llm,
        "kubeVersion": ">=1.25.0-0",
    }


def chart_values(deployment: Deployment) -> dict[str, Any]:
    """Every value of the chart, in the order that a reader needs them."""
    return {
        "engine": {
            "arch": deployment.arch,
            "sm": deployment.sm,
            "builtOn": deployment.gpu,
            "precision": deployment.precision,
            "worldSize": deployment.world_size,
            "bytes": deployment.engine_bytes,
        },
        "image": {"name": deployment.image, "pullPolicy": "IfNotPresent", "pullSecrets": []},
        "model": _model_values(deployment),
        "replicas": 1,
        "rollout": {"maxSurge": 1, "maxUnavailable": 0},
        "drainSeconds": DRAIN_S,
        "resources": {"cpu": "4", "memory": f"{gibibytes(deployment.host_memory_bytes)}Gi"},
        "shm": {"size": f"{gibibytes(deployment.shm_bytes)}Gi"},
        "probes": _probe_values(),
        **_node_values(),
        **_network_values(),
        **_scaling_values(deployment),
        "security": {"runAsUser": 1000, "readOnlyRootFilesystem": False},
        "podLabels": {},
        "podAnnotations": {},
        "extraArgs": [],
        "extraEnv": [],
    }


def _model_values(deployment: Deployment) -> dict[str, Any]:
    return {
        "existingClaim": "",
        "hostPath": "",
        "claim": {
            "size": f"{2 * gibibytes(deployment.bundle_bytes)}Gi",
            "storageClassName": "",
            "accessModes": ["ReadWriteMany"],
        },
        "subPath": "",
        "manifestSha256": deployment.manifest_sha256,
        "checkFiles": True,
    }


def _probe_values() -> dict[str, Any]:
    return {
        "startup": {
            "baseSeconds": START_BASE_S,
            "readBytesPerSecond": READ_BYTES_PER_S,
            "periodSeconds": PROBE_PERIOD_S,
        },
        "liveness": {"askModels": True, "periodSeconds": 2 * PROBE_PERIOD_S, "failureThreshold": 3},
        "readiness": {"periodSeconds": PROBE_PERIOD_S, "failureThreshold": 3},
    }


def _node_values() -> dict[str, Any]:
    return {
        "gpu": {"resource": "nvidia.com/gpu", "selectBySm": True, "product": ""},
        "nodeSelector": {},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "affinity": {},
        "runtimeClassName": "",
        "priorityClassName": "",
    }


def _network_values() -> dict[str, Any]:
    return {
        "service": {"type": "ClusterIP", "headless": False, "http": False, "annotations": {}},
        "tls": {"secretName": "", "mutual": False},
        "auth": {"apiKeySecret": "", "adminKeySecret": ""},
        "networkPolicy": {
            "enabled": True,
            "clients": [{"podSelector": {}}],
            "monitoring": [{"namespaceSelector": {}}],
        },
    }


def _scaling_values(deployment: Deployment) -> dict[str, Any]:
    return {
        "podMonitor": {"enabled": False, "interval": "15s", "labels": {}},
        "grafana": {"enabled": False, "labels": {"grafana_dashboard": "1"}},
        "autoscaling": {
            "enabled": False,
            "minReplicas": 1,
            "maxReplicas": 4,
            "metric": METRIC,
            "waitingRequestsPerReplica": deployment.waiting_requests_per_replica,
            "scaleDownSeconds": 600,
        },
    }


def with_comments(text: str, schema: Mapping[str, Any]) -> str:
    """Put the description of each value above its line.

    Args:
        text: a YAML mapping in block style.
        schema: JSON schema of it, with a `description` of every property.
    """
    import yaml

    comments = dict(_descriptions(yaml.compose(text, yaml.SafeLoader), schema))
    lines: list[str] = []
    for number, line in enumerate(text.splitlines()):
        if number in comments:
            indent, description = comments[number]
            if not indent and lines:
                lines.append("")
            width = COMMENT_WIDTH - indent
            lines += [" " * indent + "# " + part for part in textwrap.wrap(description, width)]
        lines.append(line)
    return "\n".join(lines) + "\n"


def _descriptions(node: Any, schema: Mapping[str, Any]) -> Iterator[tuple[int, tuple[int, str]]]:
    """Line of each key that the schema describes -> its indentation and description."""
    properties = schema.get("properties", {})
    for key, value in node.value:
        entry = properties.get(key.value)
        if entry is None:
            continue
        yield key.start_mark.line, (key.start_mark.column, entry["description"])
        if "properties" in entry:
            yield from _descriptions(value, entry)


def _dump(document: Mapping[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(document, sort_keys=False, default_flow_style=False, width=COMMENT_WIDTH))

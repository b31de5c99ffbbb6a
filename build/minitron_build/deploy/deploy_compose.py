"""The Compose file of a bundle: one service on this machine's GPUs.

Made as a document and written through PyYAML. What the numbers are is deployment.py's; the health check is
the chart's probe, handed to Python as text.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_build.deploy.deploy_helm import TEMPLATES_DIR
from minitron_build.deploy.deployment import (
    DRAIN_S,
    GRPC_PORT,
    HTTP_PORT,
    METRICS_PORT,
    MOUNT_PATH,
    PROBE_PERIOD_S,
    PROBE_TIMEOUT_S,
    TLS_PATH,
    Access,
    Deployment,
    server_argv,
)

PROBE_FILE = TEMPLATES_DIR / "chart" / "files" / "probe.py"
HEADER = """\
# Serves one bundle on this machine: docker compose -f FILE up -d --wait
# Ports listen on loopback only. Whoever reaches them can end the process with a request header,
# triton_grpc_error, so put a proxy that strips it in front before opening one to others.
# MINITRON_ADMIN_KEY in the environment lets its holder load and unload models; without it nobody can.
"""
API_KEY = "${MINITRON_API_KEY:?set the key that callers must send}"
ADMIN_KEY = "${{MINITRON_ADMIN_KEY:-{closed}}}"
STACK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class ComposeAccess:
    """Who reaches the service.

    Attributes:
        has_api_key: callers must send the key that is in the environment when the service is started.
        tls_dir: folder on the machine with tls.crt and tls.key, and with ca.crt for mutual TLS.
    """

    has_api_key: bool = False
    tls_dir: Path | None = None

    def in_container(self) -> Access:
        """The same for tritonserver; without an admin's key, one that nobody knows guards the models."""
        return Access(
            admin_key=ADMIN_KEY.format(closed=secrets.token_urlsafe(24)),
            api_key=API_KEY if self.has_api_key else None,
            tls=self.tls_dir is not None,
            mutual=self.tls_dir is not None and (self.tls_dir / "ca.crt").is_file(),
        )


def compose_text(
    deployment: Deployment, bundle_dir: Path, file_dir: Path, access: ComposeAccess | None = None
) -> str:
    """The whole file.

    Args:
        bundle_dir: the bundle on the machine that serves it.
        file_dir: folder of the Compose file; the bundle is named relative to it, so both can move together.
        access: who reaches it; None: whoever reaches loopback.
    """
    import yaml

    access = access or ComposeAccess()
    document = compose_document(deployment, _source(bundle_dir, file_dir), access)
    if access.tls_dir is not None:
        mount = {"type": "bind", "source": _literal(_source(access.tls_dir, file_dir)), "target": TLS_PATH}
        document["services"]["triton"]["volumes"].append(mount | {"read_only": True})
    return HEADER + str(yaml.dump(document, Dumper=_dumper(), sort_keys=False, width=100))


def compose_document(deployment: Deployment, source: str, access: ComposeAccess) -> dict[str, Any]:
    """The file as a mapping.

    Args:
        source: path of the bundle, as Compose shall read it.
        access: who reaches it.
    """
    key = {"MINITRON_API_KEY": API_KEY} if access.has_api_key else {}
    service: dict[str, Any] = {
        "image": deployment.image,
        "command": server_argv(deployment.world_size, access.in_container()),
        "working_dir": MOUNT_PATH,
        "environment": {"PYTHONDONTWRITEBYTECODE": "1", **key},
        "ports": [f"127.0.0.1:{port}:{port}" for port in (GRPC_PORT, HTTP_PORT, METRICS_PORT)],
        "volumes": [{"type": "bind", "source": _literal(source), "target": MOUNT_PATH, "read_only": True}],
        "deploy": {"resources": {"reservations": {"devices": [_gpus(deployment)]}}},
        "shm_size": str(deployment.shm_bytes),
        # NCCL pins host memory, and Triton's threads are given the stack that NVIDIA's images ask for.
        "ulimits": {"memlock": -1, "stack": STACK_BYTES},
        "healthcheck": _health_check(deployment),
        "init": True,
        "restart": "unless-stopped",
        "stop_grace_period": f"{DRAIN_S + 10}s",
        "security_opt": ["no-new-privileges:true"],
    }
    return {"name": "minitron", "services": {"triton": service}}


def _gpus(deployment: Deployment) -> dict[str, Any]:
    return {"driver": "nvidia", "count": deployment.world_size, "capabilities": ["gpu"]}


def _health_check(deployment: Deployment) -> dict[str, Any]:
    """Healthy while tokens come; failures before `start_period` is over do not count."""
    return {
        "test": ["CMD", "python3", "-c", _literal(PROBE_FILE.read_text(encoding="utf-8")), "ready"],
        "interval": "30s",
        "timeout": f"{PROBE_TIMEOUT_S}s",
        "retries": 3,
        "start_period": f"{deployment.start_s}s",
        "start_interval": f"{PROBE_PERIOD_S}s",
    }


def _source(bundle_dir: Path, file_dir: Path) -> str:
    """Relative path of the bundle, in the form that Compose takes for a path and not for a volume's name."""
    path = Path(os.path.relpath(bundle_dir.resolve(), file_dir.resolve())).as_posix()
    return path if path.startswith("../") or path == ".." else f"./{path}"


def _literal(text: str) -> str:
    """Text that Compose must not interpolate."""
    return text.replace("$", "$$")


def _dumper() -> Any:
    """PyYAML's, with text of several lines as a block, so that the script in the health check can be read."""
    import yaml

    def represent(dumper: Any, text: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)

    dumper: Any = type("BlockDumper", (yaml.SafeDumper,), {})
    dumper.add_representer(str, represent)
    return dumper

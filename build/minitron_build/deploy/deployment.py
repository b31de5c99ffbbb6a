"""What a bundle asks of the machine that serves it: image, GPUs, memory, seconds to start, command line.

Read from the manifest alone; every number is derived here, with its reason, and both deploy formats only
write it down. It knows nothing of Kubernetes or Compose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_build.bundle.bundle import MODEL_REPO_DIR, Bundle
from minitron_build.bundle.manifest import MANIFEST_NAME, digest_file
from minitron_build.errors import PlanError
from minitron_build.planning.versions import serving_container
from minitron_build.serving.triton_ranks import LAUNCHER, LAUNCHER_FLAGS
from minitron_build.serving.triton_security import protocol_flags

GIB = 1 << 30
ENGINE_DIR = f"{MODEL_REPO_DIR}/tensorrt_llm/1"
ENGINE_MODEL, TEXT_MODEL = "tensorrt_llm", "tensorrt_llm_bls"

GRPC_PORT, HTTP_PORT, METRICS_PORT = 8001, 8000, 8002
MOUNT_PATH = "/bundle"
"""Where the bundle lies in the container, and where tritonserver starts: the engine's path is relative."""
TLS_PATH = "/tls"
"""Where certificate and key lie in the container, named as in a Kubernetes secret."""
TRITONSERVER = "/opt/tritonserver/bin/tritonserver"

START_BASE_S = 120
"""CUDA and MPI start, Python models, KV cache allocation and first token, without reading the engine."""
READ_BYTES_PER_S = 200_000_000
"""A slow network volume; a local disk is ten times faster."""
DRAIN_S = 120
"""A long answer at a full batch finishes in it."""
HOST_BASE_BYTES = 8 * GIB
"""tritonserver, CUDA context, four Python models with their tokenizers."""
SHM_BASE_BYTES, SHM_BYTES_PER_RANK = GIB, GIB
"""Python models pass every tensor, NCCL and MPI their messages, through /dev/shm; a container has 64 MiB."""
WAITING_SHARE = 4
"""Another replica is worth its start when a quarter of a batch waits."""

PROBE_TIMEOUT_S, PROBE_PERIOD_S = 30, 10


@dataclass(frozen=True, slots=True)
class Deployment:
    """One bundle, as an orchestrator must know it.

    Attributes:
        arch: GPU generation, as `--arch` calls it.
        sm: compute capability x 10 of the GPU that the engine was built on.
        gpu: that GPU's name, as its driver says; empty when the manifest does not.
        world_size: ranks of the engine, one GPU each.
        image: container that holds the TensorRT-LLM of the engine, and Triton.
        max_batch_size: requests that the engine runs at once.
        engine_bytes: engine files of all ranks together.
        bundle_bytes: everything that must be on the volume.
        manifest_sha256: names this bundle among all others.
    """

    arch: str
    sm: int
    gpu: str
    precision: str
    world_size: int
    image: str
    max_batch_size: int
    engine_bytes: int
    bundle_bytes: int
    manifest_sha256: str

    @classmethod
    def of(cls, bundle: Bundle) -> Deployment:
        """Derive it.

        Raises:
            PlanError: a bundle for the CPU, or one whose manifest has no engine for every rank.
        """
        plan, manifest = bundle.manifest.plan, bundle.manifest
        if manifest.arch == "cpu":
            raise PlanError(
                "the bundle runs on the reference engine",
                expected="a bundle with a TensorRT engine",
                where=str(bundle.path),
                todo="deploy is for GPU bundles; serve this one with: minitron serve",
            )
        world_size = _number(plan, "tp_size", bundle) * _number(plan, "pp_size", bundle)
        limits = plan.get("limits")
        return cls(
            arch=manifest.arch,
            sm=_number(plan, "sm", bundle),
            gpu=str((manifest.gpu or {}).get("name") or ""),
            precision=str(plan.get("precision", "unknown")),
            world_size=world_size,
            image=str(plan.get("container") or serving_container()),
            max_batch_size=_number(limits if isinstance(limits, Mapping) else {}, "max_batch_size", bundle),
            engine_bytes=_engine_bytes(bundle, world_size),
            bundle_bytes=sum(digest.size_bytes for digest in manifest.files.values()),
            manifest_sha256=digest_file(bundle.path / MANIFEST_NAME).sha256,
        )

    @property
    def start_s(self) -> int:
        """Seconds that a start may take until the first token."""
        return START_BASE_S + math.ceil(self.engine_bytes / READ_BYTES_PER_S)

    @property
    def shm_bytes(self) -> int:
        """Size of /dev/shm."""
        return SHM_BASE_BYTES + SHM_BYTES_PER_RANK * self.world_size

    @property
    def host_memory_bytes(self) -> int:
        """Host memory: the engine files pass through it on their way to the GPU, and /dev/shm is in it."""
        return HOST_BASE_BYTES + self.engine_bytes + self.shm_bytes

    @property
    def waiting_requests_per_replica(self) -> int:
        """Requests waiting for the engine, on average, above which another replica is started."""
        return max(1, self.max_batch_size // WAITING_SHARE)


def gibibytes(size_bytes: int) -> int:
    """Whole GiB that hold so many bytes."""
    return math.ceil(size_bytes / GIB)


@dataclass(frozen=True, slots=True)
class Access:
    """Who reaches the server in the container, as its command line says it.

    Attributes:
        api_key: what callers must send, or where the orchestrator puts it; None: nothing.
        admin_key: what loading a model takes, or where the orchestrator puts it.
        tls: gRPC speaks TLS, with tls.crt and tls.key of TLS_PATH.
        mutual: callers need a certificate that ca.crt of TLS_PATH has signed.
        http_address: where HTTP listens; None: on every address.
    """

    admin_key: str
    api_key: str | None = None
    tls: bool = False
    mutual: bool = False
    http_address: str | None = None

    def flags(self) -> list[str]:
        """Triton's flags."""
        http = [] if self.http_address is None else [f"--http-address={self.http_address}"]
        tls = [
            "--grpc-use-ssl=1",
            f"--grpc-server-cert={TLS_PATH}/tls.crt",
            f"--grpc-server-key={TLS_PATH}/tls.key",
        ]
        mutual = ["--grpc-use-ssl-mutual=1", f"--grpc-root-cert={TLS_PATH}/ca.crt"]
        return [
            *http,
            *protocol_flags(self.api_key, self.admin_key),
            *(tls if self.tls else []),
            *(mutual if self.mutual else []),
        ]


def server_argv(world_size: int, access: Access, *, drain_s: int = DRAIN_S) -> list[str]:
    """The command line in the container; more than one rank is started by mpirun, the first one leads.

    Args:
        access: who reaches it.
        drain_s: seconds that requests in flight may take after SIGTERM.
    """
    ranks = [_rank_argv(rank, access, drain_s) for rank in range(world_size)]
    if world_size == 1:
        return ranks[0]
    argv = [LAUNCHER, *LAUNCHER_FLAGS, "--mca", "odls_base_sigkill_timeout", str(drain_s)]
    for rank, rank_argv in enumerate(ranks):
        argv += ([":"] if rank else []) + ["-n", "1", *rank_argv]
    return argv


def _rank_argv(rank: int, access: Access, drain_s: int) -> list[str]:
    """One rank's tritonserver: only the first loads every model and listens, the others load the engine."""
    return [
        TRITONSERVER,
        f"--model-repository={MOUNT_PATH}/{MODEL_REPO_DIR}",
        "--disable-auto-complete-config",
        f"--backend-config=python,shm-region-prefix-name=prefix{rank}_",
        f"--grpc-port={GRPC_PORT}",
        f"--http-port={HTTP_PORT}",
        f"--metrics-port={METRICS_PORT}",
        "--metrics-address=0.0.0.0",  # it would be HTTP's
        f"--exit-timeout-secs={drain_s}",
        *access.flags(),
        "--model-control-mode=explicit",
        f"--load-model={ENGINE_MODEL if rank else '*'}",
    ]


def _number(record: Mapping[str, Any], name: str, bundle: Bundle) -> int:
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PlanError(
            f"{name} in the plan is {value!r}",
            expected="a whole number, 1 or more",
            where=str(bundle.path / MANIFEST_NAME),
            todo="build the bundle again",
        )
    return value


def _engine_bytes(bundle: Bundle, world_size: int) -> int:
    """Size of the engine files; one per rank must be there."""
    names = [f"{ENGINE_DIR}/rank{rank}.engine" for rank in range(world_size)]
    for name in names:
        if name not in bundle.manifest.files:
            raise PlanError(
                f"{name} is not in the manifest",
                expected=f"the engines of {world_size} rank(s)",
                where=str(bundle.path),
                todo="build the bundle again on the GPU that will serve it",
            )
    return sum(bundle.manifest.files[name].size_bytes for name in names)

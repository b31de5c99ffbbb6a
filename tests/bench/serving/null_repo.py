"""A bundle whose engine is the null engine: the real text models, tokenizer and configurations around it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from tokenizers import Tokenizer

from minitron_build.build import build_bundle, plan_build
from minitron_build.planning.plan import PlanRequest
from minitron_build.repository import pbtxt
from minitron_build.serving.triton_server import ServerOptions, TritonServer, free_ports
from minitron_build.source.hub import resolve_checkpoint

HERE = Path(__file__).parent
STAND_IN = HERE.parents[1] / "stand_in" / "tensorrt_llm"
TEXT_MODELS = ("tensorrt_llm_bls", "ensemble")
SCRIPT_TEXT = "The quick brown fox jumps over the lazy dog, and then it sat down beside the river. "


@dataclass(frozen=True, slots=True)
class NullSettings:
    """How the null engine plays, and how the text models reach it.

    Attributes:
        step_s: time from step to step; 0: as fast as what is sent is taken.
        runs_ahead: whether a step begins before the text models have read the last one's tokens.
        link: whether the text models use the engine's link, or ask through Triton as they must ask
            TensorRT-LLM's backend.
        instances: processes of each text model.
        executor: whether the engine is the bundle's own engine model over the stand-in's executor.
    """

    step_s: float = 0.0
    runs_ahead: bool = True
    link: bool = True
    instances: int = 1
    executor: bool = False


EXECUTOR_PARAMETERS = {
    "engine": "executor",
    "engine_dir": "1",
    "batch_scheduler_policy": "guaranteed_no_evict",
    "kv_cache_free_gpu_mem_fraction": "0.9",
    "kv_cache_host_memory_bytes": "0",
    "enable_kv_cache_reuse": "true",
    "enable_chunked_context": "true",
    "normalize_log_probs": "true",
    "decoding_mode": "top_k_top_p",
    "multi_block_mode": "true",
    "enable_context_fmha_fp32_acc": "false",
    "iter_stats_max_iterations": "1000",
}
BATCH = 256


def build_once(folder: Path, checkpoint: str) -> Path:
    """A bundle for the CPU of this checkpoint; what `minitron build` makes."""
    source = resolve_checkpoint(checkpoint)
    request = PlanRequest(
        arch="cpu", max_batch_size=64, max_input_len=1024, max_seq_len=2048, max_num_tokens=256
    )
    return build_bundle(plan_build(source, request), source, folder / "bundle").path


def script_ids(bundle: Path) -> list[int]:
    """The ids that the null engine plays."""
    tokenizer = Tokenizer.from_file(str(bundle / "model_repo/preprocessing/1/tokenizer.json"))
    return list(tokenizer.encode(SCRIPT_TEXT, add_special_tokens=False).ids)


def script_texts(bundle: Path) -> list[str]:
    """The text of each of those ids."""
    tokenizer = Tokenizer.from_file(str(bundle / "model_repo/preprocessing/1/tokenizer.json"))
    return [tokenizer.decode([token_id]) for token_id in script_ids(bundle)]


def write_null_repo(bundle: Path, folder: Path, settings: NullSettings) -> Path:
    """The bundle's model repository with the null engine in it, in a folder that is not there yet."""
    repo = folder / "model_repo"
    shutil.copytree(bundle / "model_repo", repo)
    engine_dir = repo / "tensorrt_llm" / "1"
    if settings.executor:
        _write_executor(bundle, repo, settings)
    else:
        shutil.copyfile(HERE / "null_engine.py", engine_dir / "model.py")
        fields = {name: value for name, value in asdict(settings).items() if name in ("step_s", "runs_ahead")}
        (engine_dir / "null_engine.json").write_text(json.dumps(fields | {"ids": script_ids(bundle)}))
    for model in TEXT_MODELS:
        config = pbtxt.read_config(repo / model)
        pbtxt.set_parameters(config, {"engine_link": str(settings.link).lower()})
        config.instance_group[0].count = settings.instances
        pbtxt.write_config(config, repo / model)
    return repo


def _write_executor(bundle: Path, repo: Path, settings: NullSettings) -> None:
    """The engine model as it is, over TensorRT-LLM's executor as the stand-in plays it."""
    engine_dir = repo / "tensorrt_llm" / "1"
    shutil.copytree(STAND_IN, engine_dir / "tensorrt_llm")
    config = pbtxt.read_config(repo / "tensorrt_llm")
    limits = {"max_batch_size": BATCH, "max_input_len": 1024, "max_seq_len": 2048, "max_num_tokens": 1024}
    texts = {name: str(value) for name, value in limits.items()}
    pbtxt.replace_parameters(config, pbtxt.get_parameters(config) | EXECUTOR_PARAMETERS | texts)
    pbtxt.write_config(config, repo / "tensorrt_llm")
    vocab_size = json.loads((bundle / "checkpoint/config.json").read_text())["vocab_size"]
    gathers = {"gather_context_logits": False, "gather_generation_logits": False}
    model = {"vocab_size": vocab_size, "mapping": {"world_size": 1}}
    engine = {"pretrained_config": model, "build_config": limits | gathers}
    (engine_dir / "config.json").write_text(json.dumps(engine))
    (engine_dir / "rank0.engine").write_bytes(b"engine")
    script = {"ids": script_ids(bundle), "step_s": settings.step_s}
    (engine_dir / "script.json").write_text(json.dumps(script))


@contextmanager
def serving(repo: Path) -> Iterator[TritonServer]:
    """A ready server on free loopback ports, drained and stopped at the end."""
    grpc_port, http_port, metrics_port = free_ports(3)
    options = ServerOptions(
        repo, grpc_port=grpc_port, http_port=http_port, metrics_port=metrics_port, drain_timeout_s=8
    )
    with TritonServer.start(options) as server:
        server.wait_until_ready()
        yield server

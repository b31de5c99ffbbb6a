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
    """

    step_s: float = 0.0
    runs_ahead: bool = True
    link: bool = True
    instances: int = 1


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
    shutil.copyfile(HERE / "null_engine.py", engine_dir / "model.py")
    fields = {name: value for name, value in asdict(settings).items() if name in ("step_s", "runs_ahead")}
    (engine_dir / "null_engine.json").write_text(json.dumps(fields | {"ids": script_ids(bundle)}))
    for model in TEXT_MODELS:
        config = pbtxt.read_config(repo / model)
        pbtxt.set_parameters(config, {"engine_link": str(settings.link).lower()})
        config.instance_group[0].count = settings.instances
        pbtxt.write_config(config, repo / model)
    return repo


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

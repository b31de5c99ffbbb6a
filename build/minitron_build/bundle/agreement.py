"""Is a bundle's plan the plan of what lies in it? The manifest is text that anybody can edit.

Holds the plan against the engine's own `config.json` and record, and against the checkpoint's `config.json`.
That every rank has its file, and that bytes are those of the manifest, others check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron_build.bundle.bundle import CHECKPOINT_DIR, MODEL_REPO_DIR, Bundle
from minitron_build.bundle.manifest import MANIFEST_NAME
from minitron_build.engine.engine_config import EngineConfig
from minitron_build.engine.engine_record import RECORD_NAME, EngineRecord
from minitron_build.errors import CheckpointError
from minitron_build.planning.targets import GENERATIONS
from minitron_build.repository.model_repo import ENGINE_MODEL
from minitron_build.source.model_config import read_json_object

CONFIG_NAME = "config.json"
COPY_OR_BUILD = "copy the whole bundle again, or build it again"
ENGINE_PATH = f"{MODEL_REPO_DIR}/{ENGINE_MODEL}/1"


@dataclass(frozen=True, slots=True)
class _Fact:
    """What a field of the plan must be, because a file of the bundle says so."""

    field: str
    value: Any
    file: str


def check_plan(bundle: Bundle) -> str:
    """Refuse a plan that the bundle's own files contradict.

    Returns:
        What was compared, in one sentence.

    Raises:
        CheckpointError: names the field, what the manifest says and what the file; or a file that cannot be
            read.
    """
    plan, facts = bundle.manifest.plan, tuple(_facts(bundle))
    for fact in facts:
        found = plan.get(fact.field)
        if found != fact.value:
            raise CheckpointError(
                f"plan.{fact.field} is {found}",
                expected=f"{fact.value}, as {fact.file} says",
                where=str(bundle.path / MANIFEST_NAME),
                todo=COPY_OR_BUILD,
            )
    return f"the plan's {', '.join(dict.fromkeys(fact.field for fact in facts))} are those of its files"


def _facts(bundle: Bundle) -> Iterator[_Fact]:
    yield _Fact("arch", bundle.manifest.arch, "the manifest's own arch")
    if bundle.manifest.arch != "cpu" or (bundle.path / ENGINE_PATH / RECORD_NAME).is_file():
        yield from _engine_facts(bundle.path / ENGINE_PATH)
    else:
        yield _Fact("sm", None, f"{ENGINE_PATH}, which has no engine,")
    if (bundle.checkpoint / CONFIG_NAME).is_file():
        yield from _checkpoint_facts(bundle.checkpoint / CONFIG_NAME)


def _engine_facts(engine_dir: Path) -> Iterator[_Fact]:
    config, record = EngineConfig.read(engine_dir), EngineRecord.load(engine_dir)
    yield _Fact("sm", record.sm, f"{ENGINE_PATH}/{RECORD_NAME}")
    yield _Fact("arch", GENERATIONS.get(record.sm), f"SM {record.sm} of {ENGINE_PATH}/{RECORD_NAME}")
    quant_algos = {"quant_algo": config.quant_algo, "kv_cache_quant_algo": config.kv_cache_quant_algo}
    sizes = {"tp_size": config.tp_size, "pp_size": config.pp_size}
    yield from _model_facts(sizes, quant_algos, f"{ENGINE_PATH}/{CONFIG_NAME}")


def _checkpoint_facts(path: Path) -> Iterator[_Fact]:
    config = read_json_object(path, todo=COPY_OR_BUILD)
    try:
        yield from _model_facts(config["mapping"], config["quantization"], f"{CHECKPOINT_DIR}/{CONFIG_NAME}")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"a configuration that cannot be read ({error})", where=str(path), todo=COPY_OR_BUILD
        ) from None


def _model_facts(sizes: Mapping[str, Any], quantization: Mapping[str, Any], file: str) -> Iterator[_Fact]:
    yield _Fact("tp_size", sizes["tp_size"], file)
    yield _Fact("pp_size", sizes["pp_size"], file)
    yield _Fact("precision", _short(quantization.get("quant_algo")), file)
    yield _Fact("kv_cache_dtype", _short(quantization.get("kv_cache_quant_algo")), file)


def _short(quant_algo: str | None) -> str:
    """TensorRT-LLM's word for a quantisation as the plan has it."""
    return "bf16" if quant_algo is None else quant_algo.lower()

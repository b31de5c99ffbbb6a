"""What the models of a TensorRT-LLM repository must agree on, and no single file can say.

Ensemble maps against member tensors, streaming against the decoupled switch, instance counts against the
order of tokens, one logits dtype throughout. Findings are finding.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from minitron_build.lint.finding import ERROR, WARNING, Finding, finding
from minitron_build.lint.lint_engine import check_logits
from minitron_build.lint.triton_repository import UNKNOWN_TYPE, TritonModel, TritonRepository
from minitron_build.repository.engine_model import LOGITS_TENSORS
from minitron_build.repository.pbtxt import TensorSpec

STREAM_INPUTS = ("stream", "streaming")
CALLEES = {"tensorrt_llm_model_name": "tensorrt_llm", "tensorrt_llm_draft_model_name": ""}
"""Parameters of a text model that name another one, with what holds when they are not set."""


def lint_pipeline(repository: TritonRepository) -> Iterator[Finding]:
    """Everything that is wrong between models."""
    for check in CHECKS:
        yield from check(repository)


# --- ensembles


def check_ensembles(repository: TritonRepository) -> Iterator[Finding]:
    """Each step's model is there, each mapped tensor is its, and what flows has one dtype and shape."""
    for ensemble in repository.with_part("ensemble"):
        makers = dict(ensemble.inputs)
        for step in ensemble.config.ensemble_scheduling.step:
            member = repository.models.get(step.model_name)
            if member is None:
                yield finding(ERROR, ensemble, "model_name", f"{step.model_name}: no such model here")
            elif member.config is not None:
                yield from _check_member(ensemble, member, step)
                makers |= _made(step, member)
        if _is_readable(repository, ensemble):
            yield from _check_flow(repository, ensemble, makers)


def _made(step: Any, member: TritonModel) -> dict[str, TensorSpec]:
    """What a step makes, by the ensemble's name for it."""
    outputs = member.outputs
    return {value: outputs[key] for key, value in step.output_map.items() if key in outputs}


def _is_readable(repository: TritonRepository, ensemble: TritonModel) -> bool:
    """All members could be read, so that a missing tensor is the ensemble's mistake."""
    names = [step.model_name for step in ensemble.config.ensemble_scheduling.step]
    return all(name in repository.models and repository.models[name].config is not None for name in names)


def _check_member(ensemble: TritonModel, member: TritonModel, step: Any) -> Iterator[Finding]:
    for key in sorted(set(step.input_map) - member.inputs.keys()):
        yield finding(ERROR, ensemble, key, f"is no input of {member.name}", todo="take it out of input_map")
    for key in sorted(set(step.output_map) - member.outputs.keys()):
        found = f"is no output of {member.name}"
        yield finding(ERROR, ensemble, key, found, todo="take it out of output_map")
    for tensor in member.inputs.values():
        if not tensor.optional and tensor.name not in step.input_map:
            found = f"{member.name} needs this input and the step does not map it"
            yield finding(ERROR, ensemble, tensor.name, found)
    if 0 < member.config.max_batch_size < ensemble.config.max_batch_size:
        yield finding(
            ERROR,
            ensemble,
            "max_batch_size",
            f"is {ensemble.config.max_batch_size}",
            expected=f"at most {member.config.max_batch_size}, that of {member.name}",
        )


def _check_flow(
    repository: TritonRepository, ensemble: TritonModel, makers: dict[str, TensorSpec]
) -> Iterator[Finding]:
    for step in ensemble.config.ensemble_scheduling.step:
        member = repository.models[step.model_name]
        for key, name in sorted(step.input_map.items()):
            if name not in makers:
                found = f"{name} is no input of the ensemble, and no step makes it"
                yield finding(ERROR, ensemble, key, found)
            elif key in member.inputs:
                yield from _check_same(ensemble, name, makers[name], member.inputs[key], member.name)
    for name, tensor in ensemble.outputs.items():
        if name not in makers:
            yield finding(ERROR, ensemble, name, "is an output that no step makes")
        else:
            yield from _check_same(ensemble, name, makers[name], tensor, ensemble.name)


def _check_same(
    ensemble: TritonModel, name: str, made: TensorSpec, taken: TensorSpec, taker: str
) -> Iterator[Finding]:
    if UNKNOWN_TYPE not in (made.dtype, taken.dtype) and made.dtype != taken.dtype:
        yield finding(
            ERROR, ensemble, name, f"is made as {made.dtype}", expected=f"{taken.dtype}, as {taker} takes it"
        )
    fits = len(made.dims) == len(taken.dims) and all(
        one == other or -1 in (one, other) for one, other in zip(made.dims, taken.dims, strict=True)
    )
    if not fits:
        found, expected = f"is made as {list(made.dims)}", f"{list(taken.dims)}, as {taker} takes it"
        yield finding(ERROR, ensemble, name, found, expected=expected)


# --- streaming


def check_streaming(repository: TritonRepository) -> Iterator[Finding]:
    """A model that offers to stream may do so, and those in front of it and behind agree."""
    for model in (*repository.with_part("engine"), *repository.with_part("text")):
        offered = next((name for name in STREAM_INPUTS if name in model.inputs), None)
        if offered and model.is_decoupled is False:
            found = f"is false, and the model has an input {offered}"
            todo = "requests that stream are refused: set it to true, or tell clients"
            yield finding(WARNING, model, "model_transaction_policy.decoupled", found, todo=todo)
    for text, engine in _text_and_engine(repository):
        if None not in (text.is_decoupled, engine.is_decoupled) and text.is_decoupled != engine.is_decoupled:
            yield finding(
                ERROR,
                text,
                "model_transaction_policy.decoupled",
                f"is {str(text.is_decoupled).lower()}",
                expected=f"{str(engine.is_decoupled).lower()}, as {engine.name} which it calls",
            )


def _text_and_engine(repository: TritonRepository) -> Iterator[tuple[TritonModel, TritonModel]]:
    for text in repository.with_part("text"):
        engine = repository.models.get(text.value("tensorrt_llm_model_name") or "tensorrt_llm")
        if engine is not None and engine.config is not None:
            yield text, engine


def check_callees(repository: TritonRepository) -> Iterator[Finding]:
    """Models that a text model calls by name are there."""
    for text in repository.with_part("text"):
        for key, default in CALLEES.items():
            name = text.value(key) or default
            if name and name not in repository.models:
                yield finding(ERROR, text, key, f"{name}: no such model here")


def check_instances(repository: TritonRepository) -> Iterator[Finding]:
    """As many instances as the order of tokens allows and a synchronous model needs."""
    streams = any(engine.is_decoupled for engine in repository.with_part("engine"))
    members = {
        step.model_name
        for ensemble in repository.with_part("ensemble")
        for step in ensemble.config.ensemble_scheduling.step
    }
    for model in repository.with_part("postprocessing"):
        keeps_order = model.config.dynamic_batching.preserve_ordering
        if streams and model.name in members and model.num_instances > 1 and not keeps_order:
            found = f"is {model.num_instances}, and instances overtake each other in a stream"
            yield finding(ERROR, model, "instance_group.count", found, expected="1")
    for model in repository.with_part("text"):
        if model.num_instances == 1 and model.is_python and not model.is_ours:
            found = "is 1, and this model.py serves one request at a time"
            todo = "set it to the number of requests that shall run at once"
            yield finding(WARNING, model, "instance_group.count", found, todo=todo)


def check_detokenising(repository: TritonRepository) -> Iterator[Finding]:
    """Text of a stream that is decoded piece by piece loses spaces and whole characters."""
    for ensemble in repository.with_part("ensemble"):
        names = {step.model_name for step in ensemble.config.ensemble_scheduling.step}
        members = (model for name, model in repository.models.items() if name in names)
        parts = {member.part: member for member in members if member.config is not None}
        if "postprocessing" in parts and "engine" in parts and parts["engine"].is_decoupled:
            name = parts["postprocessing"].name
            found = f"decodes each piece of a stream by itself: lost spaces, broken UTF-8 in {ensemble.name}"
            yield finding(WARNING, ensemble, name, found, todo="stream from the text model instead")
    for model in repository.with_part("text"):
        accumulates = (model.value("accumulate_tokens") or "").lower() in ("true", "yes", "1", "t")
        if model.is_decoupled and model.is_python and not model.is_ours and not accumulates:
            found = "is off, so each piece of a stream is decoded by itself: lost spaces, broken UTF-8"
            yield finding(WARNING, model, "accumulate_tokens", found, todo="set it to true")


# --- one of each


def check_tokenizers(repository: TritonRepository) -> Iterator[Finding]:
    """Text is decoded with the tokenizer it was encoded with."""
    encoders = {model.value("tokenizer_dir") for model in repository.with_part("preprocessing")}
    wanted = next(iter(encoders)) if len(encoders) == 1 else None
    for model in repository.with_part("postprocessing"):
        found = model.value("tokenizer_dir")
        if None not in (found, wanted) and found != wanted:
            yield finding(
                ERROR, model, "tokenizer_dir", f"is {found}", expected=f"{wanted}, as preprocessing has it"
            )


def check_logits_types(repository: TritonRepository) -> Iterator[Finding]:
    """Every model hands logits on in the dtype the engine makes them in."""
    for text, model in _text_and_engine(repository):
        engine = repository.engine(model)
        if engine is not None:
            yield from check_logits(text, engine)
            continue
        for name in LOGITS_TENSORS:
            if name in text.outputs and name in model.outputs:
                yield from _check_same_logits(text, model, name)


def _check_same_logits(text: TritonModel, model: TritonModel, name: str) -> Iterator[Finding]:
    found, wanted = text.outputs[name].dtype, model.outputs[name].dtype
    if UNKNOWN_TYPE not in (found, wanted) and found != wanted:
        key = f"output {name} data_type"
        yield finding(ERROR, text, key, f"is {found}", expected=f"{wanted}, as {model.name} has it")


CHECKS: tuple[Callable[[TritonRepository], Iterator[Finding]], ...] = (
    *(check_ensembles, check_streaming, check_callees, check_instances),
    *(check_detokenising, check_tokenizers, check_logits_types),
)

"""A prompt and its sampling options as the tensors that a model lists, and no others.

It knows how each vocabulary of `vocabulary.py` is spoken. It knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TypeAlias

from minitron_client.errors import InvalidValueError, UnsupportedError
from minitron_client.sampling import SamplingParams
from minitron_client.tensors import InferRequest, ModelMetadata, Scalar, Tensor
from minitron_client.vocabulary import QUEUE_OUTPUTS, Vocabulary, vocabulary_of

# Without it a decoupled model's bare end mark is swallowed by the server.
_PARAMETERS: dict[str, bool | int | str] = {"triton_enable_empty_final_response": True}
_TEXTS = ("stop_words", "bad_words", "embedding_bias_words", "embedding_bias_weights")
_Given: TypeAlias = Scalar | tuple[str, ...] | tuple[float, ...]


def text_request(
    metadata: ModelMetadata,
    prompt: str | Sequence[int],
    sampling: SamplingParams,
    *,
    request_id: str,
    is_streaming: bool,
    end_ids: Sequence[int] = (),
) -> InferRequest:
    """The request for one completion.

    Args:
        metadata: of the model that answers.
        prompt: text; token ids for a model that takes them.
        sampling: how.
        request_id: id of the request.
        is_streaming: one response for each piece is wanted.
        end_ids: ids that end the text, for a model that takes token ids and is not told in `sampling`.

    Raises:
        InvalidValueError: the prompt or an option cannot be sent.
        UnsupportedError: the model does not list a tensor that an option needs.
    """
    vocabulary = vocabulary_of(metadata)
    if is_streaming and not sampling.exclude_input_in_output:
        raise InvalidValueError(
            "exclude_input_in_output=False has no effect while streaming: no chunk carries the prompt; "
            "use generate(), or put the prompt in front yourself"
        )
    given = _translated(vocabulary, sampling)
    if is_streaming or vocabulary.stream in metadata.inputs:
        given[vocabulary.stream] = is_streaming
    features = [output for option, output in vocabulary.features.items() if getattr(sampling, option)]
    asked = _offered(metadata, vocabulary, sampling, is_streaming=is_streaming)
    tensors = [
        *_prompt_tensors(metadata, vocabulary, prompt),
        *(_tensor(metadata, name, value) for name, value in given.items()),
        *(_tensor(metadata, flag, True) for flag in asked),
    ]
    if vocabulary.is_token_ids and sampling.end_id is None:
        tensors += _end_tensors(metadata, end_ids)
    extra = [*features, *(output for outputs in asked.values() for output in outputs)]
    if sampling.return_perf_metrics:
        extra += [name for name in QUEUE_OUTPUTS if name not in extra]
    return InferRequest(
        model=metadata.name,
        request_id=request_id,
        inputs=tuple(tensors),
        outputs=_wanted_outputs(metadata, vocabulary, extra),
        parameters=_parameters(vocabulary, sampling),
    )


def check_prompt(prompt: object) -> None:
    """Refuse what no model takes for a prompt; what this model takes is known with its metadata.

    Raises:
        InvalidValueError: neither a string nor a sequence.
    """
    if isinstance(prompt, (bytes, bytearray)) or not isinstance(prompt, Sequence):
        raise InvalidValueError(
            f"prompt must be a string or a list of token ids, got {type(prompt).__name__}"
        )


def stop_request(metadata: ModelMetadata, request_id: str) -> InferRequest | None:
    """The request that stops the running one of the same id; None where the model lists no `stop`.

    Cancelling the RPC does not reach a model inside an ensemble; this does.
    """
    if "stop" not in metadata.inputs:
        return None
    vocabulary = vocabulary_of(metadata)
    inputs = tuple(_tensor(metadata, name, value) for name, value in vocabulary.stop.items())
    outputs = _wanted_outputs(metadata, vocabulary, [])
    return InferRequest(metadata.name, request_id, inputs, outputs, _PARAMETERS)


def _translated(vocabulary: Vocabulary, sampling: SamplingParams) -> dict[str, _Given]:
    """The options that were given and are tensors, under this vocabulary's names."""
    given: dict[str, _Given] = {}
    for option, value in sampling.given().items():
        name = vocabulary.inputs.get(option)
        if name is not None:
            given[name] = value
        elif option in vocabulary.parameters or (option == "return_output_ids" and vocabulary.is_token_ids):
            continue  # no tensor; output ids come anyway
        elif vocabulary.is_token_ids and option in _TEXTS:
            raise UnsupportedError(
                f"{option} are texts, and this model takes token ids; use model tensorrt_llm_bls, which "
                "matches them on the text"
            )
        else:
            raise UnsupportedError(f"{option} cannot be asked of a model of the {vocabulary.name} vocabulary")
    return given


def _parameters(vocabulary: Vocabulary, sampling: SamplingParams) -> dict[str, bool | int | str]:
    asked = {name: getattr(sampling, option) for option, name in vocabulary.parameters.items()}
    return _PARAMETERS | {name: value for name, value in asked.items() if value is not None}


def _prompt_tensors(
    metadata: ModelMetadata, vocabulary: Vocabulary, prompt: str | Sequence[int]
) -> list[Tensor]:
    if isinstance(prompt, str) and not vocabulary.is_token_ids:
        return [_tensor(metadata, vocabulary.prompt, prompt)]
    if isinstance(prompt, (str, bytes)) or not isinstance(prompt, Sequence):
        wanted = "a list of token ids" if vocabulary.is_token_ids else "a string"
        raise InvalidValueError(f"prompt must be {wanted}, got {type(prompt).__name__}")
    if not vocabulary.is_token_ids:
        raise InvalidValueError(
            f"prompt must be a string for model {metadata.name}, got a {type(prompt).__name__}; "
            'token ids go to model="tensorrt_llm"'
        )
    ids = [_token_id(value) for value in prompt]
    if not ids:
        raise InvalidValueError("the prompt is empty; give at least one token id")
    return [
        _row(metadata, vocabulary.prompt, ids),
        _tensor(metadata, "input_lengths", len(ids)),
    ]


def _token_id(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 0 <= int(value) < 2**31:
        raise InvalidValueError(f"prompt must hold token ids, integers from 0, got {value!r}")
    return int(value)


def _end_tensors(metadata: ModelMetadata, end_ids: Sequence[int]) -> list[Tensor]:
    """The first id ends the text; each further one is a stop sequence of one id, as TensorRT-LLM has it."""
    if not end_ids:
        return []
    tensors = [_tensor(metadata, "end_id", end_ids[0])]
    others = tuple(end_ids[1:])
    if others:
        ends = tuple(range(1, len(others) + 1))
        spec = metadata.inputs["stop_words_list"]
        tensors.append(Tensor.of(spec, (*others, *ends), shape=(1, 2, len(others))))
    return tensors


def _row(metadata: ModelMetadata, name: str, values: Sequence[int]) -> Tensor:
    return Tensor.of(metadata.inputs[name], tuple(values))


def _tensor(metadata: ModelMetadata, name: str, value: _Given) -> Tensor:
    spec = metadata.inputs.get(name)
    if spec is None:
        raise UnsupportedError(
            f"model {metadata.name} has no input {name}, which this request needs; "
            f"it takes {', '.join(sorted(metadata.inputs)) or 'none'}"
        )
    return Tensor.of(spec, value if isinstance(value, tuple) else (value,))


def _offered(
    metadata: ModelMetadata, vocabulary: Vocabulary, sampling: SamplingParams, *, is_streaming: bool
) -> dict[str, tuple[str, ...]]:
    """What this server can tell beside the text: input flag -> outputs.

    The time in the queue costs two tensors in each response: a stream has them where they were asked for,
    an answer in one piece always.
    """
    wanted: dict[str, tuple[str, ...]] = {flag: (output,) for flag, output in vocabulary.asked.items()}
    flag = vocabulary.inputs.get("return_perf_metrics")
    if flag is not None and not is_streaming and not sampling.return_perf_metrics:
        wanted[flag] = QUEUE_OUTPUTS
    return {
        flag: outputs
        for flag, outputs in wanted.items()
        if flag in metadata.inputs and all(output in metadata.outputs for output in outputs)
    }


def _wanted_outputs(metadata: ModelMetadata, vocabulary: Vocabulary, extra: list[str]) -> tuple[str, ...]:
    """Outputs to name in the request, so that no logits travel unasked."""
    missing = [name for name in (vocabulary.answer, *extra) if name not in metadata.outputs]
    if missing:
        raise UnsupportedError(
            f"model {metadata.name} has no output {missing[0]}, which this request needs; "
            f"it gives {', '.join(sorted(metadata.outputs)) or 'none'}"
        )
    told = [name for name in vocabulary.told if name in metadata.outputs]
    return (vocabulary.answer, *told, *extra)

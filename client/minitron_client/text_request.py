"""A prompt and its sampling options as the tensors that a text model lists, and no others.

It knows the tensor names of `tensorrt_llm_bls` and `ensemble`. It knows nothing of connections.
"""

from __future__ import annotations

from collections.abc import Sequence

from minitron_client.errors import InvalidValueError, UnsupportedError
from minitron_client.sampling import SamplingParams
from minitron_client.tensors import InferRequest, ModelMetadata, Scalar, Tensor

# Sampling option -> the output that carries what it asks for
FEATURE_OUTPUTS: dict[str, str] = {"return_log_probs": "output_log_probs", "return_output_ids": "output_ids"}
# Asked for wherever the server offers them: input flag -> output
_COUNT_OUTPUTS: dict[str, str] = {
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
}
# Without it a decoupled model's bare end mark is swallowed by the server.
_PARAMETERS: dict[str, bool | int | str] = {"triton_enable_empty_final_response": True}


def text_request(
    metadata: ModelMetadata,
    prompt: str | Sequence[int],
    sampling: SamplingParams,
    *,
    request_id: str,
    is_streaming: bool,
) -> InferRequest:
    """The request for one completion.

    Raises:
        InvalidValueError: the prompt or an option cannot be sent.
        UnsupportedError: the model does not list a tensor that an option needs.
    """
    if not isinstance(prompt, str):
        raise InvalidValueError(f"prompt must be a string, got {type(prompt).__name__}")
    if is_streaming and not sampling.exclude_input_in_output:
        raise InvalidValueError(
            "exclude_input_in_output=False has no effect while streaming: no chunk carries the prompt; "
            "use generate(), or put the prompt in front yourself"
        )
    given: dict[str, Scalar | tuple[str, ...]] = {"text_input": prompt, **sampling.given()}
    if is_streaming or "stream" in metadata.inputs:
        given["stream"] = is_streaming
    features = [output for option, output in FEATURE_OUTPUTS.items() if option in given]
    counts = _offered_counts(metadata)
    tensors = tuple(_tensor(metadata, name, value) for name, value in given.items())
    return InferRequest(
        model=metadata.name,
        request_id=request_id,
        inputs=tensors + tuple(_tensor(metadata, flag, True) for flag in counts),
        outputs=_wanted_outputs(metadata, [*features, *counts.values()]),
        parameters=_PARAMETERS,
    )


def stop_request(metadata: ModelMetadata, request_id: str) -> InferRequest | None:
    """The request that stops the running one of the same id; None where the model lists no `stop`.

    Cancelling the RPC does not reach a model inside an ensemble; this does.
    """
    if "stop" not in metadata.inputs:
        return None
    given: dict[str, Scalar] = {"text_input": "", "max_tokens": 1, "stop": True}
    inputs = tuple(_tensor(metadata, name, value) for name, value in given.items())
    return InferRequest(metadata.name, request_id, inputs, _wanted_outputs(metadata, []), _PARAMETERS)


def _tensor(metadata: ModelMetadata, name: str, value: Scalar | tuple[str, ...]) -> Tensor:
    spec = metadata.inputs.get(name)
    if spec is None:
        raise UnsupportedError(
            f"model {metadata.name} has no input {name}, which this request needs; "
            f"it takes {', '.join(sorted(metadata.inputs)) or 'none'}"
        )
    return Tensor.of(spec, value if isinstance(value, tuple) else (value,))


def _offered_counts(metadata: ModelMetadata) -> dict[str, str]:
    """The token counts this server can give: input flag -> output."""
    return {
        flag: output
        for flag, output in _COUNT_OUTPUTS.items()
        if flag in metadata.inputs and output in metadata.outputs
    }


def _wanted_outputs(metadata: ModelMetadata, extra: list[str]) -> tuple[str, ...]:
    """Outputs to name in the request, so that no logits travel unasked."""
    missing = [name for name in ("text_output", *extra) if name not in metadata.outputs]
    if missing:
        raise UnsupportedError(
            f"model {metadata.name} has no output {missing[0]}, which this request needs; "
            f"it gives {', '.join(sorted(metadata.outputs)) or 'none'}"
        )
    told = [name for name in ("finish_reason",) if name in metadata.outputs]
    return ("text_output", *told, *extra)

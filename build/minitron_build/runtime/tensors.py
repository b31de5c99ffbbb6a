"""The border with Triton's Python backend: tensors in, responses and errors out.

The one module of the runtime that imports `triton_python_backend_utils`. It knows shapes and dtypes; it knows
nothing of what a tensor means.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from .inputs import Array, Inputs
from .status import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INTERNAL,
    INVALID_ARGUMENT,
    UNAVAILABLE,
    StatusError,
    invalid,
)

KEEP_FINISHED_S = 5.0
DROP_WAIT_S = 0.2
_finished: deque[tuple[float, Any]] = deque()

# Names, not values: Triton fills its module in only after the model has been imported.
_TRITON_CODES = {
    INVALID_ARGUMENT: "INVALID_ARG",
    UNAVAILABLE: "UNAVAILABLE",
    CANCELLED: "CANCELLED",
    # Triton has no code for a deadline; its own schedulers answer an expired request with UNAVAILABLE.
    DEADLINE_EXCEEDED: "UNAVAILABLE",
    INTERNAL: "INTERNAL",
}


def check_numpy() -> None:
    """Refuse numpy 2, under which this backend hands models wrong data without an error.

    Raises:
        RuntimeError: numpy 2 or newer is installed where the models run.
    """
    if int(np.__version__.split(".")[0]) >= 2:
        raise RuntimeError(
            f"numpy {np.__version__} is installed; Triton's Python backend silently corrupts tensors under "
            "numpy 2: install numpy>=1.26,<2 in the environment that runs the models"
        )


def read_arrays(request: Any) -> dict[str, Array]:
    """The input tensors of a request by name."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def read_inputs(request: Any, rows_of: str, max_bytes: int | None = None) -> Inputs:
    """Read every input tensor of a request.

    Args:
        request: Triton's request.
        rows_of: name of an input that every request has; its first dimension is the batch size.
        max_bytes: what all tensors may have together; None: any size.

    Raises:
        StatusError: that input is missing, or the tensors are too large.
    """
    arrays = read_arrays(request)
    if rows_of not in arrays:
        raise invalid(f"{rows_of} is missing; every request must have it")
    inputs = Inputs(arrays, int(arrays[rows_of].shape[0]))
    if max_bytes is not None and inputs.total_bytes > max_bytes:
        raise invalid(
            f"the tensors of the request have {inputs.total_bytes} bytes; max_request_bytes is {max_bytes}"
        )
    return inputs


def response(arrays: Mapping[str, Array]) -> Any:
    """A response that carries these tensors."""
    return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in arrays.items()])


def error_response(error: StatusError) -> Any:
    """A response that carries an error and its code."""
    code = getattr(pb_utils.TritonError, _TRITON_CODES[error.status])
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), code))


def send_final(sender: Any, last: Any) -> None:
    """Send the response that ends a request; a sender that never does leaves the client waiting for ever."""
    sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def ask_model(
    model_name: str,
    arrays: Mapping[str, Array],
    *,
    request_id: str,
    outputs: list[str],
) -> Iterator[Any]:
    """Send a request to another, decoupled model of this server and yield its responses; blocks between them.

    Raises:
        StatusError: UNAVAILABLE, the model cannot take requests.
    """
    request = pb_utils.InferenceRequest(
        model_name=model_name,
        inputs=[pb_utils.Tensor(name, array) for name, array in arrays.items()],
        requested_output_names=outputs,
        request_id=request_id,
    )
    try:
        responses = request.exec(decoupled=True)
    except pb_utils.TritonModelException as error:
        raise StatusError(UNAVAILABLE, f"model {model_name} cannot take the request: {error}") from error
    has_ended = False
    try:
        yield from responses
        has_ended = True
    finally:
        if (
            not has_ended
        ):  # the reader gave up: what is left unread would block whoever drops the last reference
            deque(responses, maxlen=0)
        _keep_a_while(responses)


def _keep_a_while(responses: Any) -> None:
    """Hold a finished iterator until Triton has dropped its own reference; drop the old ones.

    Whoever drops the last reference frees the numpy arrays of all responses. A thread of the backend does so
    without the interpreter's lock when it is the last, and corrupts the heap.
    """
    now_s = time.monotonic()
    _finished.append((now_s, responses))
    while now_s - _finished[0][0] > KEEP_FINISHED_S:
        _finished.popleft()


def drop_finished() -> None:
    """Drop every iterator that is still held, once Triton has had time to drop its own references.

    To be called while the interpreter still runs: freed after it, they end the process with a fault.
    """
    if _finished:
        time.sleep(DROP_WAIT_S)
    _finished.clear()


def read_response(answer: Any) -> dict[str, Array]:
    """The tensors of another model's response; an empty final response has none.

    Raises:
        StatusError: the response is an error.
    """
    if answer.has_error():
        raise StatusError.read(answer.error().message())
    # Copied: the arrays outlive the response, whose memory Triton reuses.
    return {tensor.name(): np.array(tensor.as_numpy()) for tensor in answer.output_tensors()}


def as_status(error: BaseException, where: str) -> StatusError:
    """What a caller may read of an exception; the traceback goes to the server's log and nowhere else."""
    if isinstance(error, StatusError):
        return error
    log_error(f"{where}: {''.join(traceback.format_exception(error))}")
    return StatusError(
        INTERNAL, f"the request failed in {where} ({type(error).__name__}); see the server's log"
    )


def make_metric_family(name: str, description: str, kind: str) -> Any:
    """A maker of series of one metric, from their labels; it must outlive them.

    Args:
        kind: "counter" or "gauge".
    """
    family = pb_utils.MetricFamily(
        name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind.upper())
    )
    return lambda labels: family.Metric(labels=dict(labels))


def free_circles() -> None:
    """Free what only circles of references keep; call it last in `finalize`.

    A sender in one, by way of an error's traceback say, that is freed only as the interpreter ends locks a
    mutex in memory that is gone by then, and takes the process down with SIGSEGV.
    """
    gc.collect()


def log_error(text: str) -> None:
    """Write to the server's log."""
    for line in _lines(text):
        pb_utils.Logger.log_error(line)


def log_info(text: str) -> None:
    """Write to the server's log."""
    for line in _lines(text):
        pb_utils.Logger.log_info(line)


def log_warning(text: str) -> None:
    """Write to the server's log."""
    for line in _lines(text):
        pb_utils.Logger.log_warn(line)


def _lines(text: str) -> Iterator[str]:
    return (line for line in text.splitlines() if line.strip())

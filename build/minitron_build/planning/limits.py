"""The limits an engine is built for, and how they are decided.

It knows what the four numbers mean to each other and to the model. How many requests memory holds it is told.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from minitron_build.errors import PlanError
from minitron_build.planning.request import Decision, PlanRequest, flag_name
from minitron_build.source.model_config import ModelConfig

DEFAULT_INPUT_LEN = 8192
DEFAULT_SEQ_LEN = 9216
"""An 8k prompt must be able to answer."""
GPU_STEP_TOKENS = 8192
CPU_STEP_TOKENS = 512
MAX_ADVISED_STEP_TOKENS = 16384
"""Beyond it TensorRT-LLM 1.2.1 warns that activations take much memory for little speed."""
TYPICAL_SHARE = 4
"""A request is expected to use this part of the longest sequence: batches are chosen for it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine is built for; words are TensorRT-LLM's, all in tokens but the first."""

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise PlanError(f"{flag_name(name)} is {value}", expected="1 or more")
        if self.max_input_len >= self.max_seq_len:
            raise PlanError(
                f"--max-input-len {self.max_input_len} with --max-seq-len {self.max_seq_len}",
                expected="an input shorter than the sequence, so that an answer fits",
                todo="lower --max-input-len or raise --max-seq-len",
            )

    @property
    def typical_len(self) -> int:
        """Tokens that a request is expected to hold in the KV cache."""
        return typical_len(self.max_seq_len)


def typical_len(max_seq_len: int) -> int:
    """Tokens that a request is expected to hold in the KV cache, at least one."""
    return max(1, max_seq_len // TYPICAL_SHARE)


def decide_lengths(config: ModelConfig, request: PlanRequest) -> tuple[int, int]:
    """(max_input_len, max_seq_len) as asked for, or as the model allows.

    Raises:
        PlanError: longer than the model's positions.
    """
    positions = config.max_position_embeddings
    seq_len = request.max_seq_len or min(DEFAULT_SEQ_LEN, positions)
    if seq_len > positions:
        raise PlanError(
            f"--max-seq-len {seq_len}", expected=f"at most the model's max_position_embeddings {positions}"
        )
    return request.max_input_len or min(DEFAULT_INPUT_LEN, seq_len - 1), seq_len


def cpu_limits(
    config: ModelConfig, request: PlanRequest, batch: tuple[int, str]
) -> tuple[Limits, list[Decision]]:
    """Limits of the reference engine.

    Args:
        batch: how many requests to run at once when the user does not say, with the reason.
    """
    step = (CPU_STEP_TOKENS, "long prompts are prefilled in chunks, so that running streams go on")
    return _decide(config, request, batch, step)


def gpu_limits(
    config: ModelConfig,
    request: PlanRequest,
    batch: tuple[int, str],
    *,
    has_chunked_context: bool,
    tokens_per_block: int,
) -> tuple[Limits, list[Decision]]:
    """Limits of a TensorRT engine; see `cpu_limits`.

    Raises:
        PlanError: limits that contradict each other, or that `trtllm-build` would refuse or change.
    """
    input_len, seq_len = decide_lengths(config, request)
    step = (GPU_STEP_TOKENS, "an 8k prompt in one step; longer ones and mixed steps are chunked")
    if not has_chunked_context and input_len > GPU_STEP_TOKENS:
        step = (input_len, "without chunked context a prompt must fit in one step")
    most = seq_len * (request.max_batch_size or batch[0])
    if step[0] > most:
        step = (most, "all requests at full length hold no more")
    limits, decisions = _decide(config, request, batch, step)
    _check_step(limits, has_chunked_context=has_chunked_context, tokens_per_block=tokens_per_block)
    return limits, decisions


def limit_warnings(limits: Limits) -> tuple[str, ...]:
    """What is legal and probably not meant, one sentence each."""
    if limits.max_num_tokens <= MAX_ADVISED_STEP_TOKENS:
        return ()
    return (
        f"--max-num-tokens {limits.max_num_tokens} is more than {MAX_ADVISED_STEP_TOKENS}: "
        "activations grow with it, throughput hardly does",
    )


def _decide(
    config: ModelConfig, request: PlanRequest, batch: tuple[int, str], step: tuple[int, str]
) -> tuple[Limits, list[Decision]]:
    input_len, seq_len = decide_lengths(config, request)
    limits = Limits(
        max_batch_size=request.max_batch_size or batch[0],
        max_input_len=input_len,
        max_seq_len=seq_len,
        max_num_tokens=request.max_num_tokens or step[0],
    )
    reasons = {
        "max_batch_size": batch[1],
        **_length_reasons(config, input_len, seq_len),
        "max_num_tokens": step[1],
    }
    return limits, [
        Decision(name, str(value), "asked for" if getattr(request, name) is not None else reasons[name])
        for name, value in asdict(limits).items()
    ]


def _check_step(limits: Limits, *, has_chunked_context: bool, tokens_per_block: int) -> None:
    """Refuse tokens per step that the other limits contradict."""
    step, most = limits.max_num_tokens, limits.max_seq_len * limits.max_batch_size
    if step > most:
        raise PlanError(
            f"--max-num-tokens {step}",
            expected=f"at most {most}, which is --max-batch-size x --max-seq-len",
            todo="trtllm-build would lower it: lower it here",
        )
    least = max(tokens_per_block, limits.max_batch_size)
    if step < least:
        raise PlanError(
            f"--max-num-tokens {step}",
            expected=f"at least {least}: a KV cache block of {tokens_per_block} tokens, and one token for "
            f"each of {limits.max_batch_size} requests",
        )
    if limits.max_input_len > step and not has_chunked_context:
        raise PlanError(
            f"--max-input-len {limits.max_input_len} with --max-num-tokens {step} and no chunked context",
            expected="a prompt that fits in one step",
            todo=f"lower --max-input-len to {step}, raise --max-num-tokens, or leave "
            "--plugin use_paged_context_fmha=disable out",
        )


def _length_reasons(config: ModelConfig, input_len: int, seq_len: int) -> dict[str, str]:
    longest = config.max_position_embeddings
    if seq_len >= longest:
        end = f"the model's positions end at {longest}"
        return {"max_input_len": f"{end}; one is left for an answer", "max_seq_len": end}
    return {
        "max_input_len": "the model was distilled on 8k contexts",
        "max_seq_len": f"room for an answer behind a prompt of {input_len}",
    }

"""The flags that say what to plan, shared by every verb that plans, and the request they make."""

from __future__ import annotations

import argparse
from pathlib import Path

from minitron_build.calibration.samples import DEFAULT_SAMPLES, DEFAULT_SEQ_LEN, MIN_SAMPLE_TOKENS
from minitron_build.errors import PlanError
from minitron_build.planning.gpu_models import find_models
from minitron_build.planning.request import ENGINE_BACKENDS, PlanRequest
from minitron_build.planning.targets import ARCH_CHOICES, GENERATIONS
from minitron_build.source.hub import DEFAULT_CHECKPOINT
from minitron_client.flag_types import integer, number

SIZE_FLAGS = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
REQUEST_FIELDS = (
    *("arch", "sm", "precision", "kv_cache_dtype", "tp_size", "pp_size"),
    *SIZE_FLAGS,
    *("gpu", "gpu_memory_gb", "kv_cache_fraction", "engine_backend"),
    *("calib_data", "calib_samples", "calib_seq_len"),
)


def add_plan_flags(parser: argparse.ArgumentParser, *, auto_arch: str) -> None:
    """Add them; their names are fixed.

    Args:
        auto_arch: what `--arch auto` means to the verb, for its help.
    """
    add = parser.add_argument
    add("--arch", choices=ARCH_CHOICES, default="auto", help=f"what to build for (default: {auto_arch})")
    others = ", ".join(map(str, GENERATIONS))
    add("--sm", type=_sm, metavar="N", help=f"compute capability x 10, instead of the arch's own: {others}")
    add("--checkpoint", default=DEFAULT_CHECKPOINT, metavar="DIR|HF_ID|demo", help="default: %(default)s")
    add(
        "--revision",
        help="commit, tag or branch on the hub (default: what main is now, recorded as a commit)",
    )
    add("--precision", choices=("auto", "bf16", "fp8"), default="auto", help="default: fp8 where it runs")
    add("--kv-cache-dtype", choices=("auto", "bf16", "fp8"), default="auto", help="default: as the weights")
    add("--tp-size", type=integer(1), default=1, metavar="N", help="tensor parallel ranks")
    add("--pp-size", type=integer(1), default=1, metavar="N", help="pipeline parallel ranks")
    for name in SIZE_FLAGS:
        add("--" + name.replace("_", "-"), type=integer(1), metavar="N")
    add(
        "--gpu",
        type=_gpu,
        metavar="NAME",
        help="GPU model that limits are chosen for, such as L40S or A100-80GB",
    )
    add(
        "--gpu-memory-gb",
        type=number(0, is_open_below=True),
        metavar="N",
        help="its memory in 10^9 bytes",
    )
    add(
        "--kv-cache-fraction",
        type=number(0, 1, is_open_below=True),
        default=0.9,
        metavar="F",
        help="of the GPU memory free beside the engine, what the KV cache takes (default: %(default)s)",
    )
    add(
        "--engine-backend",
        choices=tuple(ENGINE_BACKENDS),
        default="cpp",
        help="what serves an engine: Triton's C++ backend, or TensorRT-LLM's executor in a Python model "
        "(faster text; one rank only) (default: %(default)s)",
    )
    add(
        "--plugin",
        action="append",
        type=_plugin,
        default=[],
        metavar="NAME=VALUE",
        help="a plugin flag of trtllm-build, over what the plan chooses; may be given again",
    )
    add_calibration_flags(parser)


def add_calibration_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of an FP8 conversion; their names are fixed."""
    add = parser.add_argument
    add(
        "--calib-data",
        type=Path,
        metavar="FILE",
        help="calibration samples: .txt, .jsonl or .json of ids (default: texts in the package)",
    )
    add(
        "--calib-samples",
        type=integer(1),
        metavar="N",
        help=f"samples at most (default: {DEFAULT_SAMPLES})",
    )
    add(
        "--calib-seq-len",
        type=integer(MIN_SAMPLE_TOKENS),
        metavar="N",
        help=f"tokens of a sample (default: {DEFAULT_SEQ_LEN})",
    )
    add(
        "--fp8-exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="linear layers that stay bf16, such as '*.mlp.proj'; may be given again",
    )


def plan_request(args: argparse.Namespace) -> PlanRequest:
    """What the parsed flags ask for.

    Raises:
        PlanError: a value out of range.
    """
    fields = {name: getattr(args, name) for name in REQUEST_FIELDS}
    return PlanRequest(**fields, plugins=tuple(args.plugin), fp8_exclude=tuple(args.fp8_exclude))


def _sm(text: str) -> int:
    known = {str(number): number for number in GENERATIONS}
    if text not in known:
        names = ", ".join(f"{number} {name}" for number, name in GENERATIONS.items())
        raise argparse.ArgumentTypeError(f"expected one of {names}, got {text!r}")
    return known[text]


def _gpu(text: str) -> str:
    try:
        find_models(text)
    except PlanError as error:
        raise argparse.ArgumentTypeError(f"expected {error.expected}, got {text!r}; {error.todo}") from None
    return text


def _plugin(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value

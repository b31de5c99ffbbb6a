"""The gate: measures a candidate against its source and judges what was measured.

`short_verify` is what a build runs after an FP8 conversion. It knows which measures there are and in which
order they are taken; the measures themselves are other modules' business.
"""

from __future__ import annotations

from pathlib import Path

from minitron_build.errors import RefusedError
from minitron_build.verify.result import VerifyResult

__all__ = ["VerifyResult", "short_verify"]


def short_verify(checkpoint_dir: Path, source_dir: Path) -> VerifyResult:
    """Hold a TensorRT-LLM checkpoint against the Hugging Face checkpoint it was made from, in short.

    A few held-out sequences through both models, one layer of each in memory at a time.

    Args:
        checkpoint_dir: bf16 or FP8, any tp x pp mapping.
        source_dir: the Hugging Face folder, with its tokenizer.

    Returns:
        The verdict; `passed` is False where a threshold is missed, which is not raised.

    Raises:
        CheckpointError: one of the two cannot be executed, or they are not of one shape.
    """
    raise RefusedError(
        "the short verification is not part of this version", where=f"{checkpoint_dir} against {source_dir}"
    )

"""`minitron logits`: next-token logits of a TensorRT-LLM checkpoint, bf16 or FP8, computed here, as JSON.

It knows the files and the flags; the reference engine knows the model. One line on stdout:
`{"results": [{"top": [[id, logit], ...]}, ...]}`, one result per sequence, for its last position.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from minitron_build.errors import CheckpointError, RefusedError
from minitron_client.flag_types import integer

COMPUTE_DTYPE_NAMES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")
DEFAULT_TOP_K = 10


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `minitron logits`."""
    parser.add_argument("checkpoint_dir", type=Path, metavar="CHECKPOINT_DIR", help="TensorRT-LLM checkpoint")
    parser.add_argument(
        "--input-ids", type=Path, required=True, metavar="FILE.json", help="list of lists of ids"
    )
    parser.add_argument(
        "--top-k",
        type=integer(1),
        default=DEFAULT_TOP_K,
        metavar="N",
        help="logits per sequence (%(default)s)",
    )
    parser.add_argument(
        "--compute-dtype", choices=COMPUTE_DTYPE_NAMES, default="float32", help="arithmetic (%(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default="cpu",
        help="where; a GPU from Ada on multiplies FP8 numbers itself (%(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the logits; exit status 0."""
    results = top_logits(
        args.checkpoint_dir,
        read_input_ids(args.input_ids),
        top_k=args.top_k,
        compute_dtype=args.compute_dtype,
        device=args.device,
    )
    print(json.dumps({"results": [{"top": top} for top in results]}))
    return 0


def top_logits(
    checkpoint_dir: Path,
    sequences: list[list[int]],
    *,
    top_k: int = DEFAULT_TOP_K,
    compute_dtype: str = "float32",
    device: str = "cpu",
) -> list[list[tuple[int, float]]]:
    """The largest logits behind each sequence.

    Args:
        checkpoint_dir: a TensorRT-LLM checkpoint, any tp x pp mapping, unquantised or FP8.
        sequences: token ids, at least one each.
        top_k: how many (id, logit) pairs per sequence, the largest first.
        compute_dtype: "float32" or "bfloat16".
        device: "cpu" or "cuda".

    Raises:
        CheckpointError: the checkpoint cannot be executed.
        RefusedError: no CUDA device, an id outside the vocabulary, too many tokens, or a bad top_k.
    """
    from minitron_build.runtime.reference_engine import (
        LlamaModel,
        UnsupportedCheckpointError,
        read_checkpoint_config,
    )

    _check_device(device)
    try:
        config = read_checkpoint_config(checkpoint_dir)
        _check_top_k(top_k, config.vocab_size)
        for number, ids in enumerate(sequences):
            _check_sequence(number, ids, config.vocab_size, config.max_position_embeddings)
        longest = max(len(ids) for ids in sequences)
        model = LlamaModel(checkpoint_dir, max_seq_len=longest, compute_dtype=compute_dtype, device=device)
    except UnsupportedCheckpointError as error:
        raise CheckpointError(str(error)) from error
    return [_top(model.last_logits(ids), top_k) for ids in sequences]


def _top(logits: Any, top_k: int) -> list[tuple[int, float]]:
    """The largest of a [vocab_size] tensor as (id, logit); equal ones by id."""
    values, ids = logits.sort(descending=True, stable=True)
    return list(zip(ids[:top_k].tolist(), values[:top_k].tolist(), strict=True))


def read_input_ids(path: Path) -> list[list[int]]:
    """Read a JSON file that holds a list of lists of token ids.

    Raises:
        RefusedError: the file is missing or holds something else.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedError(f"cannot be read ({error.strerror})", where=str(path)) from error
    except ValueError as error:
        raise RefusedError(
            f"not JSON ({error})", expected="a list of lists of token ids", where=str(path)
        ) from error
    if not isinstance(raw, list) or not raw or not all(_is_id_list(ids) for ids in raw):
        raise RefusedError(
            "found something else",
            expected="a list of lists of token ids, such as [[1, 2, 3]]",
            where=str(path),
        )
    return raw


def _is_id_list(ids: object) -> bool:
    return isinstance(ids, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in ids)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise RefusedError(
            f"torch {torch.__version__} finds no CUDA device",
            expected="a GPU and a torch built for it",
            where="--device",
            todo="use --device cpu",
        )


def _check_top_k(top_k: int, vocab_size: int) -> None:
    if not 1 <= top_k <= vocab_size:
        raise RefusedError(
            f"{top_k}", expected=f"a number from 1 to {vocab_size}, the vocabulary", where="--top-k"
        )


def _check_sequence(number: int, ids: list[int], vocab_size: int, max_positions: int) -> None:
    where = f"--input-ids, sequence {number}"
    if not ids:
        raise RefusedError("the sequence is empty", expected="at least one token id", where=where)
    outside = next((one for one in ids if not 0 <= one < vocab_size), None)
    if outside is not None:
        raise RefusedError(f"token id {outside}", expected=f"ids from 0 to {vocab_size - 1}", where=where)
    if len(ids) > max_positions:
        raise RefusedError(
            f"{len(ids)} tokens", expected=f"at most {max_positions}, the model's positions", where=where
        )

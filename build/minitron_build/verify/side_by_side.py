"""Source and candidate through their layers side by side, one layer of each in memory.

All sequences of a verification go through in one pass, so that nine gigabytes are read once. It knows hidden
states, layer errors and logits of chosen rows; which sequences these are and what is good enough it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minitron_build.errors import StageError
from minitron_build.verify.statistics import TokenComparison, compare_rows, snr_db

if TYPE_CHECKING:
    import torch

    from minitron_build.runtime.reference_engine import ModelSource, OutputHead, Reuse
    from minitron_build.verify.runner import Ids, Progress, Runner

LOGIT_ROWS = 64
"""Rows whose logits of both models are in memory at once: 33 MB each at 128,256 tokens."""
COMPARED_ROWS = 8192
LOCAL_TOKENS = 512
"""The first sequences, up to so many tokens, also show each layer's own error."""


@dataclass(frozen=True, slots=True)
class LayerError:
    """How far a layer of the candidate is from the source's.

    Attributes:
        own_snr_db: of what the layer adds, given the source's hidden states: the layer's own error.
        stream_snr_db: of the hidden states behind it, errors of all layers before it included.
    """

    own_snr_db: float
    stream_snr_db: float


@dataclass(frozen=True, slots=True, eq=False)
class SideBySide:
    """What is left of a pass: hidden states behind the last layer, each layer's error, and both heads.

    Attributes:
        source, candidate: [tokens, hidden] of each sequence; the candidate may have more of them.
    """

    source: list[torch.Tensor]
    candidate: list[torch.Tensor]
    layers: tuple[LayerError, ...]
    heads: tuple[OutputHead, OutputHead]

    def logits(self, index: int, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of rows of a sequence, the source's and the candidate's, float32 [rows, vocab_size] each."""
        return self.heads[0].logits(self.source[index][start:end]), self.candidate_logits(index, start, end)

    def candidate_logits(self, index: int, start: int, end: int) -> torch.Tensor:
        """Logits of rows of a sequence, the candidate's alone."""
        return self.heads[1].logits(self.candidate[index][start:end])


def run_side_by_side(
    source: Runner,
    candidate: Runner,
    shared: Sequence[Ids],
    candidate_only: Sequence[Ids],
    reuse: Mapping[int, Reuse],
    progress: Progress,
) -> SideBySide:
    """One pass of all layers.

    Args:
        shared: through both models.
        candidate_only: behind them, through the candidate alone.
        reuse: by index in the candidate's sequences, which KV cache is taken up again, and where.

    Raises:
        StageError: the source gives no finite numbers, so nothing can be held against it.
    """
    source_hidden, candidate_hidden = source.embed(shared), candidate.embed([*shared, *candidate_only])
    num_local = _num_local(shared)
    errors = []
    for index in range(source.num_layers):
        progress("layers", index, source.num_layers)
        before = source_hidden[:num_local]
        source_hidden = source.run_layer(index, source_hidden)
        # The source's own hidden states go through the candidate's layer too, behind all others.
        through = candidate.run_layer(index, [*candidate_hidden, *before], reuse)
        candidate_hidden, given = through[:-num_local], through[-num_local:]
        errors.append(_layer_error(before, source_hidden[:num_local], candidate_hidden[:num_local], given))
        _check_finite(index, source_hidden)
    progress("layers", source.num_layers, source.num_layers)
    return SideBySide(source_hidden, candidate_hidden, tuple(errors), _heads(source, candidate))


def compare_tokens(passed: SideBySide, index: int, ids: Ids) -> Iterator[TokenComparison]:
    """Next-token distributions of both models at every token of a sequence that has a next one."""
    import torch

    for start in range(0, len(ids) - 1, LOGIT_ROWS):
        end = min(start + LOGIT_ROWS, len(ids) - 1)
        next_ids = torch.tensor(ids[start + 1 : end + 1])
        yield compare_rows(*passed.logits(index, start, end), next_ids, start)


def _heads(source: Runner, candidate: Runner) -> tuple[OutputHead, OutputHead]:
    """Both output heads; one stands for both where they are equal, as after every conversion of ours."""
    ours, theirs = source.source, candidate.source
    is_same = (
        ours.config.norm_epsilon == theirs.config.norm_epsilon
        and _is_same(ours, theirs, lambda one: one.final_norm())
        and _is_same(ours, theirs, lambda one: one.lm_head().weight)
    )
    head = source.output_head()
    return head, head if is_same else candidate.output_head()


def _is_same(one: ModelSource, other: ModelSource, part: Callable[[ModelSource], torch.Tensor]) -> bool:
    """Whether two models have the same numbers; the file's pages are given back while comparing."""
    import torch

    first, second = part(one), part(other)
    if first.dtype != second.dtype:
        return False
    for rows in zip(torch.split(first, COMPARED_ROWS), torch.split(second, COMPARED_ROWS), strict=True):
        if not torch.equal(*rows):
            return False
        one.release()
        other.release()
    return True


def _num_local(sequences: Sequence[Ids]) -> int:
    """How many of the first sequences fit LOCAL_TOKENS; at least one."""
    tokens = 0
    for index, ids in enumerate(sequences):
        tokens += len(ids)
        if tokens > LOCAL_TOKENS:
            return max(index, 1)
    return len(sequences)


def _layer_error(
    before: Sequence[torch.Tensor],
    source: Sequence[torch.Tensor],
    candidate: Sequence[torch.Tensor],
    given: Sequence[torch.Tensor],
) -> LayerError:
    """Of one layer: hidden states before it, behind the source's, the candidate's own and those given it."""
    added = [after - start for after, start in zip(source, before, strict=True)]
    own_noise = [after - other for after, other in zip(source, given, strict=True)]
    stream_noise = [after - other for after, other in zip(source, candidate, strict=True)]
    return LayerError(snr_db(energy(added), energy(own_noise)), snr_db(energy(source), energy(stream_noise)))


def energy(parts: Sequence[torch.Tensor]) -> float:
    """Sum of squares; row by row in float32, over the rows in float64."""
    return sum(float(part.float().norm(dim=-1).double().square().sum()) for part in parts)


def _check_finite(index: int, hidden: Sequence[torch.Tensor]) -> None:
    if not all(bool(one.isfinite().all()) for one in hidden):
        raise StageError(f"the source's hidden states behind layer {index} are not finite: check its weights")

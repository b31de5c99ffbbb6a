"""Two models' next-token distributions, compared token by token.

It knows logits and arrays of per-token numbers: negative log-likelihoods, KL divergences, agreement. It knows
nothing of models, files or thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

Numbers = npt.NDArray[np.float64]
POSITION_BUCKETS = 32
MAX_SNR_DB = 200.0
"""Stands for no noise at all, which JSON has no number for."""


@dataclass(frozen=True, slots=True, eq=False)
class TokenComparison:
    """One number a predicted token in each array; all arrays are of one length.

    Attributes:
        positions: of the predicting token in its sequence.
        source_nll: -log of the probability that the source gave the true next token, nats.
        candidate_nll: the candidate's.
        kl: KL(source || candidate) of the two next-token distributions, nats.
        is_same_top1: 1.0 where both find the same token likeliest.
    """

    positions: Numbers
    source_nll: Numbers
    candidate_nll: Numbers
    kl: Numbers
    is_same_top1: Numbers

    @property
    def source_perplexity(self) -> float:
        """Exp of the mean negative log-likelihood."""
        return perplexity(self.source_nll)

    @property
    def candidate_perplexity(self) -> float:
        """Exp of the mean negative log-likelihood."""
        return perplexity(self.candidate_nll)

    @property
    def perplexity_rise(self) -> float:
        """How much worse the candidate predicts, as a fraction of the source's perplexity."""
        with np.errstate(over="ignore"):
            return float(np.expm1(self.candidate_nll.mean() - self.source_nll.mean()))

    @property
    def mean_kl(self) -> float:
        """Mean KL divergence, nats."""
        return float(self.kl.mean())

    @property
    def p99_kl(self) -> float:
        """99th percentile of the KL divergence, nats."""
        return float(np.percentile(self.kl, 99)) if np.isfinite(self.kl).all() else math.nan

    @property
    def top1_agreement(self) -> float:
        """Share of tokens where both find the same one likeliest."""
        return float(self.is_same_top1.mean())

    def by_position(self, width: int | None = None) -> list[tuple[int, float, float, float]]:
        """(first position, source perplexity, candidate perplexity, mean KL) of ranges of positions.

        Args:
            width: positions of a range; None: such that there are POSITION_BUCKETS at most.
        """
        longest = int(self.positions.max()) + 1
        width = width or -(-longest // POSITION_BUCKETS)
        rows = []
        for start in range(0, longest, width):
            inside = (self.positions >= start) & (self.positions < start + width)
            if inside.any():
                source, candidate = (perplexity(one[inside]) for one in (self.source_nll, self.candidate_nll))
                rows.append((start, source, candidate, float(self.kl[inside].mean())))
        return rows

    @classmethod
    def joined(cls, parts: Iterable[TokenComparison]) -> TokenComparison:
        """All tokens of several comparisons."""
        listed = list(parts)
        names = ("positions", "source_nll", "candidate_nll", "kl", "is_same_top1")
        return cls(*(np.concatenate([getattr(part, name) for part in listed]) for name in names))


def perplexity(nll: Numbers) -> float:
    """Exp of the mean negative log-likelihood; infinite where that is too large for a float."""
    with np.errstate(over="ignore"):
        return float(np.exp(nll.mean()))


def compare_rows(
    source: torch.Tensor, candidate: torch.Tensor, next_ids: torch.Tensor, first_position: int
) -> TokenComparison:
    """Compare consecutive rows of logits.

    Args:
        source, candidate: float32 [rows, vocab_size].
        next_ids: int64 [rows], the token that truly followed.
        first_position: of the first row.
    """
    source_log, candidate_log = source.log_softmax(-1), candidate.log_softmax(-1)
    wanted = next_ids.to(source.device)[:, None]
    arrays = (
        -source_log.gather(1, wanted)[:, 0],
        -candidate_log.gather(1, wanted)[:, 0],
        kl_divergence(source_log, candidate_log),
        source.argmax(-1) == candidate.argmax(-1),
    )
    positions = np.arange(first_position, first_position + len(next_ids), dtype=np.float64)
    return TokenComparison(positions, *(array.double().cpu().numpy() for array in arrays))


def kl_divergence(source_log: torch.Tensor, candidate_log: torch.Tensor) -> torch.Tensor:
    """KL(source || candidate) of rows of log-probabilities, float32 [rows], nats."""
    return (source_log.exp() * (source_log - candidate_log)).sum(-1).clamp_min(0)


def snr_db(signal_energy: float, noise_energy: float) -> float:
    """Signal-to-noise ratio in dB, at most MAX_SNR_DB; -infinite where the noise is no number."""
    if not math.isfinite(noise_energy) or signal_energy <= 0:
        return -math.inf
    if noise_energy == 0:
        return MAX_SNR_DB
    return min(10 * math.log10(signal_energy / noise_energy), MAX_SNR_DB)

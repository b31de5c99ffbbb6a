"""One layer at a time: the same bits as the whole model in memory, from any source, mixed at will.

Run: pytest tests/unit/test_reference_engine_layerwise.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp8_model import write_fp8_checkpoint
from minitron_build.checkpoint.convert import convert_checkpoint
from minitron_build.runtime.reference_engine import (
    CheckpointConfig,
    LayerRunner,
    LlamaModel,
    Reuse,
    StoredLayer,
    StoredLinear,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from minitron_build.runtime.reference_engine.kv_cache import SequenceKvCache

SEQUENCES = [[508, 1, 2, 3], [(11 * n) % 500 for n in range(300)], [7]]


@pytest.fixture(scope="module")
def checkpoints(tiny_minitron: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layerwise")
    convert_checkpoint(tiny_minitron, folder / "bf16")
    write_fp8_checkpoint(tiny_minitron, folder / "fp8", excluded=("1.attention.dense",))
    return {name: folder / name for name in ("bf16", "fp8")}


def last_logits(runner: LayerRunner, sequences: list[list[int]] = SEQUENCES) -> list[torch.Tensor]:
    hidden = runner.embed(sequences)
    for index in range(runner.num_layers):
        hidden = runner.run_layer(index, hidden)
    head = runner.output_head()
    return [head.logits(one[-1:])[0] for one in hidden]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_layer_by_layer_equals_the_whole_model(
    checkpoints: dict[str, Path], name: str, compute_dtype: str
) -> None:
    runner = LayerRunner(open_checkpoint(checkpoints[name]), max_seq_len=300, compute_dtype=compute_dtype)
    model = LlamaModel(checkpoints[name], max_seq_len=300, compute_dtype=compute_dtype)
    for ids, logits in zip(SEQUENCES, last_logits(runner), strict=True):
        assert torch.equal(logits, model.last_logits(ids))


class Mixed:
    """A source of the caller's own: FP8 layers, but one module of one layer from elsewhere."""

    def __init__(self, fp8_dir: Path, bf16_dir: Path) -> None:
        self._fp8, self._bf16 = open_checkpoint(fp8_dir), open_checkpoint(bf16_dir)

    @property
    def config(self) -> CheckpointConfig:
        return self._fp8.config

    def embedding(self) -> torch.Tensor:
        return self._fp8.embedding()

    def layer(self, index: int) -> StoredLayer:
        fp8 = self._fp8.layer(index)
        return replace(fp8, dense=self._bf16.layer(index).dense) if index == 1 else fp8

    def final_norm(self) -> torch.Tensor:
        return self._fp8.final_norm()

    def lm_head(self) -> StoredLinear:
        return self._fp8.lm_head()

    def release(self) -> None:
        self._fp8.release()
        self._bf16.release()


def test_a_module_from_another_source_equals_a_checkpoint_that_excludes_it(
    checkpoints: dict[str, Path], tiny_minitron: Path, tmp_path: Path
) -> None:
    whole_fp8 = write_fp8_checkpoint(tiny_minitron, tmp_path / "whole")
    mixed = LayerRunner(Mixed(whole_fp8, checkpoints["bf16"]), max_seq_len=300)
    excluding = LayerRunner(open_checkpoint(checkpoints["fp8"]), max_seq_len=300)
    plain = LayerRunner(open_checkpoint(whole_fp8), max_seq_len=300)
    for one, other, third in zip(*map(last_logits, (mixed, excluding, plain)), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, third)


def test_hidden_states_are_handed_out_after_every_layer(checkpoints: dict[str, Path]) -> None:
    runner = LayerRunner(open_checkpoint(checkpoints["fp8"]), max_seq_len=300)
    before = runner.embed(SEQUENCES)
    copies = [one.clone() for one in before]
    after = runner.run_layer(0, before)
    assert [one.shape for one in after] == [(4, 96), (300, 96), (1, 96)]
    assert all(map(torch.equal, before, copies))
    assert not torch.equal(before[0], after[0])


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([[1], []], "sequence 1 has 0 tokens; expected 1 to 8"),
        ([[1] * 9], "sequence 0 has 9 tokens"),
        ([[1, 512]], "sequence 0 holds token id 512; expected 0 to 511"),
        ([[-1]], "token id -1"),
    ],
)
def test_sequences_are_checked(
    checkpoints: dict[str, Path], sequences: list[list[int]], message: str
) -> None:
    runner = LayerRunner(open_checkpoint(checkpoints["bf16"]), max_seq_len=8)
    with pytest.raises(ValueError, match=message):
        runner.embed(sequences)


def test_what_the_model_cannot_do_is_refused(checkpoints: dict[str, Path]) -> None:
    source = open_checkpoint(checkpoints["bf16"])
    with pytest.raises(UnsupportedCheckpointError, match="131073; the model has 131072 positions"):
        LayerRunner(source, max_seq_len=131073)
    with pytest.raises(ValueError, match="compute_dtype is 'int8'"):
        LayerRunner(source, max_seq_len=8, compute_dtype="int8")


@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_a_reused_kv_cache_gives_the_same_bits(checkpoints: dict[str, Path], name: str) -> None:
    runner = LayerRunner(open_checkpoint(checkpoints[name]), max_seq_len=300)
    hidden = runner.embed([*SEQUENCES, SEQUENCES[1], SEQUENCES[0]])
    whole = runner.run_layer(0, hidden)
    reused = runner.run_layer(0, hidden, reuse={3: Reuse(of=1, at=131), 4: Reuse(of=0, at=3)})
    assert torch.equal(reused[3], reused[1])
    assert torch.equal(reused[4], reused[0])
    assert torch.equal(reused[2], whole[2])
    # Cut elsewhere, other row counts may add in another order, and a number may fall across a border of E4M3.
    assert (whole[1] - reused[1]).norm() < 1e-3 * whole[1].norm()


def test_a_cache_that_forgets_shows(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = LayerRunner(open_checkpoint(checkpoints["fp8"]), max_seq_len=300)
    hidden = runner.embed([SEQUENCES[1], SEQUENCES[1]])
    rewind = SequenceKvCache.rewind
    monkeypatch.setattr(SequenceKvCache, "rewind", lambda self, count: rewind(self, count - 1))
    once, again = runner.run_layer(0, hidden, reuse={1: Reuse(of=0, at=131)})
    assert (once[131:] - again[131:]).abs().max() > 1e-3


def test_a_cache_rewinds_within_what_it_holds(checkpoints: dict[str, Path]) -> None:
    cache = LlamaModel(checkpoints["fp8"], max_seq_len=8).new_cache()
    with pytest.raises(ValueError, match="rewind to 1 tokens; expected 0 to 0"):
        cache.rewind(1)

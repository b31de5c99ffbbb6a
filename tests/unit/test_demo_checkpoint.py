"""The demo checkpoint has the family's traits and predicts Python; its trainer writes a real checkpoint.

pytest tests/unit/test_demo_checkpoint.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import minitron_build
from minitron_build.demo_model import train_demo
from minitron_build.demo_model.train_demo import Article, DemoShape, Recipe
from minitron_build.errors import MachineError, RefusedError

pytestmark = pytest.mark.unit

DEMO_DIR = Path(minitron_build.__file__).parent / "demo_model" / "checkpoint"
MAX_FOLDER_BYTES = 9_500_000

# Written for this test, so no standard library holds it.
SNIPPET = '''\
import os
import sys


class TreeWalker:
    """Walk a directory tree and count the files in it."""

    def __init__(self, root, follow_links=False):
        self.root = root
        self.follow_links = follow_links
        self._count = 0

    def walk(self):
        for name in os.listdir(self.root):
            path = os.path.join(self.root, name)
            if os.path.isfile(path):
                self._count += 1
        return self._count


def main():
    if len(sys.argv) != 2:
        raise ValueError("expected one argument")
    print(TreeWalker(sys.argv[1]).walk())


if __name__ == "__main__":
    main()
'''

TINY_SHAPE = DemoShape(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8)
TINY_RECIPE = Recipe(steps=12, warmup_steps=2, seq_len=32, long_seq_len=64, long_fraction=0.25)


@pytest.fixture(scope="module")
def config() -> Any:
    return read_json(DEMO_DIR / "config.json")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_DIR / "tokenizer.json"))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: weight.float() for name, weight in load_file(DEMO_DIR / "model.safetensors").items()}


@pytest.fixture(scope="module")
def training() -> Any:
    return read_json(DEMO_DIR / "training.json")


@pytest.fixture
def stdlib_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of forty modules and one help topic; `test/` must not be read."""
    monkeypatch.setattr("pydoc_data.topics.topics", {"while": "The while statement repeats.\n"})
    library = tmp_path / "lib"
    (library / "test").mkdir(parents=True)
    (library / "test" / "test_secret.py").write_text("SECRET = 1\n")
    for index in range(40):
        (library / f"module_{index}.py").write_text(f"NUMBER = {index}\n\n\n{SNIPPET}")
    return library


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_folder_holds_one_small_whole_checkpoint() -> None:
    files = {path.name: path.stat().st_size for path in DEMO_DIR.iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert sum(files.values()) < MAX_FOLDER_BYTES


def test_config_keeps_the_traits_that_break_careless_converters(config: dict[str, Any]) -> None:
    assert config == train_demo.hf_config(DemoShape())
    assert config["num_attention_heads"] * config["head_dim"] != config["hidden_size"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["rope_scaling"]["rope_type"] == "llama3"
    assert config["tie_word_embeddings"] is False


def test_weights_are_bf16_and_exactly_those_of_a_llama() -> None:
    stored = load_file(DEMO_DIR / "model.safetensors")
    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(LlamaConfig.from_pretrained(DEMO_DIR))
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert {name: tuple(weight.shape) for name, weight in stored.items()} == shapes
    assert {weight.dtype for weight in stored.values()} == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in stored.values())


def test_training_record_belongs_to_this_file(training: dict[str, Any]) -> None:
    digest = hashlib.sha256((DEMO_DIR / "model.safetensors").read_bytes()).hexdigest()
    assert training["model_sha256"] == digest
    assert training["is_finished"] is True
    assert training["held_out"]["perplexity"] < training["unigram_perplexity"] / 15


def test_special_tokens_fill_the_top_of_the_vocabulary(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    first = config["vocab_size"] - 4
    assert [tokenizer.token_to_id(token) for token in train_demo.SPECIAL_TOKENS] == list(
        range(first, first + 4)
    )
    assert (config["bos_token_id"], config["eos_token_id"]) == (first, first + 1)


def test_vocabulary_holds_every_byte(tokenizer: Tokenizer) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    assert len(alphabet) == 256
    assert set(alphabet) <= set(tokenizer.get_vocab())


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x , 1 .\n",
        "  leading, trailing  \t\r\n\n",
        "👩\u200d👩\u200d👧 🏳️\u200d🌈 🇳🇴",
        "日本語のテキスト、中文。한국어",
        "naïve ﬁ e\u0301 Ω ½ \u00a0\u2028",
        "".join(map(chr, range(0x800))),
        "".join(map(chr, [*range(0xFF0, 0x1010), 0xFFFD, 0x10000, 0x10FFFF])),
        "",
    ],
    ids=["code", "blanks", "emoji", "cjk", "marks", "two-byte", "ends-of-planes", "empty"],
)
def test_text_survives_both_tokenizers(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert ids[0] == tokenizer.token_to_id(train_demo.BEGIN_OF_TEXT)
    assert tokenizer.decode(ids[1:]) == text
    hf_tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO_DIR)
    assert hf_tokenizer(text)["input_ids"] == ids
    assert hf_tokenizer.decode(ids[1:]) == text


def test_forward_equals_transformers(weights: dict[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    model = LlamaForCausalLM.from_pretrained(DEMO_DIR, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([tokenizer.encode(SNIPPET * 3).ids])  # [1, tokens]
    with torch.no_grad():
        expected = model(ids).logits
        found = train_demo.forward(weights, DemoShape(), ids)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_model_predicts_python_it_never_saw(
    weights: dict[str, torch.Tensor], tokenizer: Tokenizer, training: dict[str, Any]
) -> None:
    found = train_demo.score(weights, DemoShape(), tokenizer, [SNIPPET])
    assert found.perplexity < 40, "uniform is 4096"
    assert found.perplexity < training["unigram_perplexity"] / 20


def test_model_ends_a_text_where_one_ends(weights: dict[str, torch.Tensor], tokenizer: Tokenizer) -> None:
    def end_probability(text: str) -> float:
        ids = torch.tensor([tokenizer.encode(text).ids])
        with torch.no_grad():
            logits = train_demo.forward(weights, DemoShape(), ids)[0, -1]
        return logits.softmax(dim=-1)[DemoShape().eos_token_id].item()

    assert end_probability(SNIPPET) > 0.01
    assert end_probability(SNIPPET) > 50 * end_probability(SNIPPET.removesuffix("main()\n"))


def test_training_lowers_the_loss_and_writes_a_checkpoint_that_transformers_reads(
    tmp_path: Path, stdlib_dir: Path
) -> None:
    output_dir = tmp_path / "demo"
    facts: Any = train_demo.train_demo(output_dir, TINY_RECIPE, 0.0, shape=TINY_SHAPE, stdlib_dir=stdlib_dir)
    assert json.loads(json.dumps(facts)) == read_json(output_dir / "training.json")
    assert (facts["steps"], facts["is_finished"]) == (12, True)
    assert facts["tokens_seen"] == 9 * 2 * 32 + 3 * 2 * 64
    assert facts["held_out"]["perplexity"] < TINY_SHAPE.vocab_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "lib"], "a partial folder was left"
    model = LlamaForCausalLM.from_pretrained(output_dir, dtype=torch.float32)
    assert model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size


def test_same_seed_same_weights(stdlib_dir: Path) -> None:
    corpus = train_demo.read_corpus(stdlib_dir)
    tokenizer = train_demo.train_tokenizer([article.text for article in corpus.train], TINY_SHAPE)
    encoded = [train_demo.encode_article(tokenizer, article, TINY_SHAPE) for article in corpus.train]

    def trained() -> dict[str, torch.Tensor]:
        torch.manual_seed(TINY_RECIPE.seed)
        weights = train_demo.initial_weights(TINY_SHAPE)
        assert len(list(train_demo.training_steps(weights, TINY_SHAPE, TINY_RECIPE, encoded))) == 12
        return weights

    first, second = trained(), trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_stops_when_the_time_is_up() -> None:
    article = train_demo.EncodedArticle(whole=tuple(range(200)), parts=(tuple(range(200)),))
    weights = train_demo.initial_weights(TINY_SHAPE)
    hurried = dataclasses.replace(TINY_RECIPE, steps=10**9, max_train_s=0.2)
    *_, report = train_demo.training_steps(weights, TINY_SHAPE, hurried, [article])
    assert report.elapsed_s >= 0.2
    assert report.step < hurried.steps


def test_corpus_skips_tests_and_holds_out_files_with_their_docstrings(stdlib_dir: Path) -> None:
    corpus = train_demo.read_corpus(stdlib_dir)
    train_names = {article.name for article in corpus.train}
    assert corpus.num_source_files == 40
    assert not any("secret" in name for name in train_names)
    assert corpus.held_out
    assert not train_names & {article.name for article in corpus.held_out}
    share = sum(Article(f"module_{index}.py", "").is_held_out for index in range(4000)) / 4000
    assert share == pytest.approx(1 / train_demo.HELD_OUT_ONE_IN, rel=0.2)


def test_parts_begin_at_top_level_definitions() -> None:
    parts = train_demo.parts_of("import functools  # " + "x" * 60 + "\n\n\n@functools.cache\n" + SNIPPET[23:])
    assert [part.splitlines()[0][:10] for part in parts] == ["import fun", "@functools", "def main()"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_key_value_heads": 3}, "no ratio"),
        ({"head_dim": 7}, "even number"),
        ({"head_dim": 24}, "not this family's shape"),
    ],
)
def test_shape_refuses_what_the_family_is_not(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoShape(**sizes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 100}, "expected 1 to 99"),
        ({"rows": 3}, "multiples of 2"),
        ({"max_train_s": 0.0}, "expected more than 0"),
    ],
)
def test_recipe_refuses_a_schedule_that_does_not_add_up(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_learning_rate_warms_up_and_decays_with_the_later_of_steps_and_time() -> None:
    recipe = Recipe(steps=1000, max_train_s=100.0)
    assert recipe.learning_rate(0, 0.0) == pytest.approx(recipe.peak_learning_rate / recipe.warmup_steps)
    assert recipe.learning_rate(recipe.warmup_steps, 0.0) == pytest.approx(recipe.peak_learning_rate)
    assert recipe.learning_rate(1000, 1.0) == pytest.approx(recipe.final_learning_rate)
    assert recipe.progress(step=500, elapsed_s=10.0) == 0.5
    assert recipe.progress(step=500, elapsed_s=90.0) == 0.9


def test_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_demo.main(["--output-dir", str(tmp_path)]) == 1
    assert "the output folder exists; delete it or name another" in capsys.readouterr().err
    assert train_demo.main(["--output-dir", str(tmp_path / "new"), "--steps", "5"]) == 1
    assert (
        "--steps, --max-train-s: warmup_steps 100: expected 1 to 4; train for longer"
        in capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no Python source files"):
        train_demo.read_corpus(tmp_path)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(RefusedError, match="to fill the vocabulary"):
        train_demo.train_tokenizer(["short"], TINY_SHAPE)
    article = train_demo.EncodedArticle(whole=(1, 2, 3), parts=((1, 2, 3),))
    with pytest.raises(RefusedError, match="3 training tokens; expected more than one row of 32"):
        next(train_demo.batches([article], 2, 32, random.Random(1)))

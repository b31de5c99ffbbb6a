"""The committed model repository against upstream's tensors, and what of the models needs no Triton."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron_build.repository import pbtxt
from minitron_build.runtime.engine_step import EngineStep
from minitron_build.runtime.inputs import Inputs
from minitron_build.runtime.parameters import ParameterError, Parameters
from minitron_build.runtime.priority import PriorityLevels
from minitron_build.runtime.prompts import PromptEncoder
from minitron_build.runtime.status import StatusError
from minitron_build.runtime.text_generation import TextGeneration
from minitron_build.runtime.text_request import TextSequence, read_text_request
from minitron_build.runtime.token_request import read_token_request
from minitron_build.runtime.tokenizer import TextTokenizer
from minitron_build.runtime.tokenizer_files import TokenizerFiles
from minitron_build.runtime.word_lists import pack, unpack

ROOT = Path(__file__).parents[2]
MODEL_REPO = ROOT / "model_repo"
UPSTREAM = json.loads((ROOT / "tests/golden/data/triton_tensors.json").read_text())["models"]
MODELS = ("ensemble", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls", "postprocessing")
TEXT_MODELS = ("tensorrt_llm_bls", "ensemble")
_TEXT = {"input": {"stop", "return_output_ids", "random_seed"}, "output": {"finish_reason", "output_ids"}}
_TOKENIZER = {
    "input": {"RETURN_TOKENIZER"},
    "output": {"TOKENIZER_SHA256", "TOKENIZER_FILE_NAMES", "TOKENIZER_FILES"},
}
ADDED = {"tensorrt_llm_bls": _TEXT, "ensemble": _TEXT, "preprocessing": _TOKENIZER}
PLACEHOLDERS = {"${logits_datatype}": "TYPE_FP32"}
LEFT_OUT = {
    # What this model cannot use: other modalities, encoders, prompt tables, adapters, guided and draft
    # decoding.
    "image", "images", "video", "pixel", "aspect", "vision", "attention", "is", "encoder", "decoder", "cross",
    "skip", "prompt", "lora", "guided", "draft", "num", "use", "mrope", "context", "retention", "lookahead",
    "acceptance", "total", "request", "out",
}  # fmt: skip


def specs(model: str, side: Any) -> dict[str, pbtxt.TensorSpec]:
    listed = list(pbtxt.tensors(pbtxt.read_config(MODEL_REPO / model), side))
    by_name = {spec.name: spec for spec in listed}
    assert len(by_name) == len(listed)
    return by_name


def test_the_repository_holds_the_five_models_and_nothing_else() -> None:
    assert sorted(path.name for path in MODEL_REPO.iterdir()) == sorted(MODELS)
    for model in MODELS:
        assert pbtxt.read_config(MODEL_REPO / model).name == model
        assert (MODEL_REPO / model / "1" / "model.py").is_file()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("model", MODELS)
def test_tensors_are_upstreams(model: str, side: str) -> None:
    ours = specs(model, side)
    upstream = {tensor["name"]: tensor for tensor in UPSTREAM[model][f"{side}s"]}
    assert set(ours) - set(upstream) == ADDED.get(model, {}).get(side, set())
    for name in set(ours) & set(upstream):
        theirs = upstream[name]
        reshape = theirs["reshape"]
        assert ours[name] == pbtxt.TensorSpec(
            name=name,
            dtype=PLACEHOLDERS.get(theirs["dtype"], theirs["dtype"]),
            dims=tuple(theirs["dims"]),
            optional=theirs.get("optional", False),
            reshape=None if reshape is None else tuple(reshape),
            allow_ragged_batch=theirs.get("allow_ragged_batch", False),
        )
    for name in set(upstream) - set(ours):
        assert name.lower().split("_")[0] in LEFT_OUT


def test_additions_are_optional_so_that_upstreams_clients_keep_working() -> None:
    for model, added in ADDED.items():
        assert all(specs(model, "input")[name].optional for name in added["input"])


def test_the_ensemble_is_the_text_model_under_its_second_name() -> None:
    for side in ("input", "output"):
        assert set(specs("ensemble", side)) == set(specs("tensorrt_llm_bls", side))
    one, other = (pbtxt.read_config(MODEL_REPO / model) for model in TEXT_MODELS)
    assert pbtxt.get_parameters(one) == pbtxt.get_parameters(other)
    doors = {(MODEL_REPO / model / "1" / "model.py").read_text() for model in TEXT_MODELS}
    assert len(doors) == 1


def test_models_that_stream_are_decoupled_and_have_one_instance() -> None:
    for model in MODELS:
        config = pbtxt.read_config(MODEL_REPO / model)
        assert config.backend == "python"
        assert config.model_transaction_policy.decoupled == (model in ("tensorrt_llm", *TEXT_MODELS))
        assert [group.count for group in config.instance_group] == [1]


# --- parameters


def parameters(model_dir: Path, **values: str) -> Parameters:
    config = {"parameters": {key: {"string_value": value} for key, value in values.items()}}
    args = {"model_config": json.dumps(config), "model_repository": str(model_dir), "model_name": "m"}
    return Parameters(args)


def test_parameters_are_read(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    read = parameters(tmp_path / "m", number="7", yes="True", no="false", ids="1, 2", folder="../there")
    (tmp_path / "m").mkdir()
    assert (read.number("number"), read.flag("yes"), read.flag("no")) == (7, True, False)
    assert read.token_ids("ids") == (1, 2)
    assert read.folder("folder").resolve() == tmp_path / "there"


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        ("text", "", "parameter x of model m is missing; set it in config.pbtxt"),
        ("number", "-1", "parameter x of model m is '-1'; expected a whole number"),
        ("flag", "yes", "parameter x of model m is 'yes'; expected true or false"),
        ("token_ids", "1,,2", "parameter x of model m is '1,,2'; expected token ids separated by commas"),
        ("folder", "gone", "which is not a folder; serve the whole bundle, or set it in config.pbtxt"),
    ],
)
def test_a_wrong_parameter_is_refused(tmp_path: Path, kind: str, value: str, sentence: str) -> None:
    with pytest.raises(ParameterError, match=sentence.replace(".", r"\.")):
        getattr(parameters(tmp_path, x=value), kind)("x")


# --- inputs


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(StatusError) as caught:
        call(*args)
    assert str(caught.value).startswith("INVALID_ARGUMENT: ")
    return caught.value.sentence


def test_inputs_are_read_by_row() -> None:
    words = np.array([[b"a", b"b"], [b"c", b""]], dtype=np.object_)
    inputs = Inputs({"n": np.array([3, 4]), "words": words, "ids": np.array([[1, 2], [3, 4]])}, 2)
    assert [inputs.scalar("n", row) for row in range(2)] == [3, 4]
    assert [inputs.texts("words", row) for row in range(2)] == [("a", "b"), ("c",)]
    assert inputs.scalar("absent", 0, 9) == 9
    assert inputs.row("absent", 0) is None
    assert inputs.same("absent", 9) == 9


def test_inputs_of_the_wrong_shape_are_refused() -> None:
    inputs = Inputs({"n": np.array([[3, 4]]), "two": np.array([1, 2]), "ids": np.array([[1, 2]])}, 2)
    assert "ids has shape [1, 2]; expected 2 rows" in refusal(inputs.row, "ids", 0)
    assert "two differs between the rows" in refusal(inputs.same, "two", 0)
    assert "n has shape [1, 2]; expected one value for each of 1 rows" in refusal(
        Inputs({"n": np.array([[3, 4]])}, 1).scalar, "n", 0
    )


def test_word_lists_survive_the_flat_layout() -> None:
    rows = [[(1, 2), (3,)], [], [(4,)]]
    packed = pack(rows)
    assert packed.shape == (3, 2, 3)
    assert packed[0].tolist() == [[1, 2, 3], [2, 3, -1]]
    assert [unpack(row, "x") for row in packed] == [tuple(row) for row in rows]
    assert pack([[], []]).shape == (2, 2, 0)
    assert unpack(None, "x") == ()


@pytest.mark.parametrize(
    ("packed", "sentence"),
    [
        ([[1, 2], [3, -1]], "x has sequence ends [3] over 2 ids"),
        ([[1, 2], [2, 1]], "x has sequence ends [2, 1] over 2 ids"),
        ([[1, 2], [0, 1]], "x has sequence ends [0, 1] over 2 ids"),
        ([[1, 2]], "x has shape [1, 2] per row; expected [2, length]"),
    ],
)
def test_a_broken_word_list_is_refused(packed: list[list[int]], sentence: str) -> None:
    assert sentence in refusal(unpack, np.array(packed, dtype=np.int32), "x")


def test_unset_sampling_tensors_leave_upstreams_defaults_and_seeds_count_up() -> None:
    arrays = {
        "input_ids": np.array([[1, 2]]),
        "input_lengths": np.array([2]),
        "request_output_len": np.array([3]),
    }
    asked = read_token_request(
        Inputs(arrays | {"num_return_sequences": np.array([2]), "seed": np.array([2**64 - 1], np.uint64)}, 1),
        key="k",
        exclude_input_default=True,
    )
    assert [one.generation.sampling.seed for one in asked.sequences] == [2**64 - 1, 0]
    assert [one.generation.key for one in asked.sequences] == ["k.0.0", "k.0.1"]
    assert asked.sequences[0].generation.sampling.is_greedy
    assert asked.exclude_input
    assert not asked.streaming
    assert asked.sequences[0].generation.end_id is None


# --- text


@pytest.fixture
def encoder(tiny_minitron: Path) -> PromptEncoder:
    values = {"tokenizer_dir": str(tiny_minitron), "add_special_tokens": "true", "pad_token_id": "509"}
    return PromptEncoder(parameters(tiny_minitron, eos_token_ids="509,510", **values))


def text_inputs(**values: Any) -> Inputs:
    arrays = {
        name: np.array([[value]], dtype=np.object_ if isinstance(value, bytes) else None)
        for name, value in ({"text_input": b"abc", "max_tokens": 5} | values).items()
    }
    return Inputs(arrays, 1)


def test_a_text_request_becomes_an_engine_request(encoder: PromptEncoder) -> None:
    asked = read_text_request(
        text_inputs(temperature=0.5, seed=7, stop_words=b"x", bad_words=b"yz", return_log_probs=True), encoder
    )
    (sequence,) = asked.sequences
    engine = {name: array.tolist() for name, array in sequence.engine_inputs.items()}
    ids = encoder.tokenizer.encode("abc", add_special_tokens=True)
    assert (engine["input_ids"], engine["input_lengths"]) == ([ids], [[len(ids)]])
    assert (engine["temperature"], engine["seed"]) == ([[0.5]], [[7]])
    assert (engine["end_id"], engine["pad_id"]) == ([[509]], [[509]])
    assert engine["stop_words_list"] == [[[510], [1]]]  # further end ids; stop words are matched on the text
    assert unpack(np.array(engine["bad_words_list"][0]), "x") == encoder.word_ids(["yz"])
    assert engine["streaming"] == [[True]]  # so that the stop word is seen in time
    assert engine["return_log_probs"] == [[True]]
    assert "return_context_logits" not in engine
    assert not asked.streaming


def test_an_end_id_of_the_request_replaces_the_models_and_a_negative_one_ends_nothing(
    encoder: PromptEncoder,
) -> None:
    (sequence,) = read_text_request(text_inputs(end_id=65), encoder).sequences
    assert sequence.end_ids == (65,)
    assert "stop_words_list" not in sequence.engine_inputs
    (sequence,) = read_text_request(text_inputs(end_id=-1), encoder).sequences
    assert sequence.end_ids == ()
    assert "end_id" not in sequence.engine_inputs


HERE_TOKENIZER = TextTokenizer(ROOT / "tests" / "golden" / "data" / "tiny_minitron")


def generation(tokenizer: TextTokenizer, **changes: Any) -> TextGeneration:
    fields: dict[str, Any] = {
        "batch_index": 0,
        "sequence_index": 0,
        "prompt": "p",
        "input_tokens": 1,
        "min_tokens": 0,
        "stop_words": (),
        "end_ids": (509,),
        "engine_inputs": {},
    }
    return TextGeneration(TextSequence(**(fields | changes)), tokenizer, skip_special_tokens=True)


def test_ids_travel_with_the_text_they_complete(tiny_minitron: Path) -> None:
    tokenizer = TextTokenizer(tiny_minitron)
    ids = tokenizer.encode("👍", add_special_tokens=False)
    assert len(ids) > 1
    text = generation(tokenizer)
    for token_id in ids[:-1]:
        text.feed(EngineStep([token_id]))
        assert text.take() is None
    text.feed(EngineStep([ids[-1]]))
    taken = text.take()
    assert taken is not None
    assert taken["text_output"].item().decode() == "👍"
    assert taken["output_ids"].tolist() == [ids]
    assert "finish_reason" not in taken


def test_what_follows_the_end_is_cut_off_text_ids_and_log_probs_alike(tiny_minitron: Path) -> None:
    tokenizer = TextTokenizer(tiny_minitron)
    ids = tokenizer.encode("one two three", add_special_tokens=False)
    text = generation(tokenizer, stop_words=("two",))
    text.feed(EngineStep(ids, [-1.0] * len(ids)))
    text.feed(EngineStep(ids))
    text.finish("length")
    taken = text.take()
    assert taken is not None
    assert taken["text_output"].item() == b"one two"
    kept = taken["output_ids"].tolist()[0]
    assert tokenizer.decode(kept, skip_special_tokens=True).startswith("one two")
    assert taken["output_log_probs"].shape == (1, 1, len(kept))
    assert taken["cum_log_probs"].item() == -len(kept)
    assert taken["num_output_tokens"].item() == len(kept)
    assert taken["finish_reason"].item() == b"stop"


@settings(max_examples=300, deadline=None)
@given(data=st.data(), ids=st.lists(st.integers(0, 511), min_size=1, max_size=40), wants_word=st.booleans())
def test_any_ids_in_any_steps_give_the_text_of_one_step(
    data: st.DataObject, ids: list[int], wants_word: bool
) -> None:
    whole = HERE_TOKENIZER.decode([one for one in ids if one != 509], skip_special_tokens=True)
    words = (whole[len(whole) // 2 :][:3],) if wants_word and whole else ()
    stream, unary = (generation(HERE_TOKENIZER, stop_words=words) for _ in range(2))
    unary.feed(EngineStep(ids, finish_reason="length"))
    place, pieces, told = 0, [], []
    while place < len(ids):
        size = data.draw(st.integers(1, len(ids) - place))
        place += size
        stream.feed(
            EngineStep(ids[place - size : place], finish_reason=None if place < len(ids) else "length")
        )
        if (taken := stream.take()) is not None:
            pieces.append(taken["text_output"].item())
            told += taken["output_ids"].reshape(-1).tolist()
    at_once = unary.take()
    assert at_once is not None
    assert b"".join(pieces) == at_once["text_output"].item()
    assert told == at_once["output_ids"].reshape(-1).tolist()
    assert stream.finish_reason == unary.finish_reason
    for piece in pieces:
        piece.decode()  # never half a character


@pytest.mark.parametrize(
    ("ids", "min_tokens", "reason", "text"),
    [
        ([65, 509], 0, "stop", "b"),
        ([65, 66], 0, "length", "bc"),
        ([65, 509, 66], 3, "length", "bc"),  # an end id before min_tokens ends nothing
    ],
)
def test_why_a_text_ended(
    tiny_minitron: Path, ids: list[int], min_tokens: int, reason: str, text: str
) -> None:
    tokenizer = TextTokenizer(tiny_minitron)
    made = generation(tokenizer, min_tokens=min_tokens)
    made.feed(EngineStep(ids))
    made.finish("length")
    taken = made.take()
    assert taken is not None
    assert made.finish_reason == reason
    assert taken["text_output"].item().decode() == text


# --- errors


@pytest.mark.parametrize(
    ("message", "status", "sentence"),
    [
        ("UNAVAILABLE: 3 requests wait", "UNAVAILABLE", "3 requests wait"),
        ("Stub process 'x' is not healthy.", "UNAVAILABLE", "Stub process 'x' is not healthy."),
        ("Request timeout expired", "DEADLINE_EXCEEDED", "Request timeout expired"),
        ("Prompt length (9) exceeds maximum input length (8)", "INVALID_ARGUMENT", None),
        ("something: else", "INTERNAL", "something: else"),
    ],
)
def test_another_models_message_becomes_a_status(message: str, status: str, sentence: str | None) -> None:
    error = StatusError.read(message)
    assert (error.status, error.sentence) == (status, sentence or message)


def test_a_status_is_one_line_and_one_of_the_known() -> None:
    assert str(StatusError("INTERNAL", "a\n  b")) == "INTERNAL: a b"
    with pytest.raises(ValueError, match="expected one of INVALID_ARGUMENT"):
        StatusError("TEAPOT", "x")


# --- priorities and tokenizer files


def levels(tmp_path: Path, count: str = "3", default: str = "2") -> PriorityLevels:
    return PriorityLevels(parameters(tmp_path, priority_levels=count, default_priority_level=default))


@pytest.mark.parametrize(
    ("given", "level"), [("", 2), ("{}", 2), ('{"priority_level":1}', 1), ('{"priority_level":"3"}', 3)]
)
def test_a_requests_priority_level_is_read(tmp_path: Path, given: str, level: int) -> None:
    assert levels(tmp_path).read(given) == level


@pytest.mark.parametrize("asked", ["0", "4", "-1", "1.5", "true", '"first"', "null"])
def test_a_wrong_priority_level_is_refused(tmp_path: Path, asked: str) -> None:
    sentence = refusal(levels(tmp_path).read, f'{{"priority_level":{asked}}}')
    assert sentence.endswith("this model has levels 1 (first) to 3")


def test_a_default_level_that_there_is_not_refuses_the_load(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="expected 1 to priority_levels, which is 1"):
        levels(tmp_path, count="1", default="2")


def test_one_digest_stands_for_all_files_of_the_tokenizer(tiny_minitron: Path, tmp_path: Path) -> None:
    arrays = TokenizerFiles(tiny_minitron).arrays()
    names = [name.decode() for name in arrays["TOKENIZER_FILE_NAMES"][0]]
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    for name, raw in zip(names, arrays["TOKENIZER_FILES"][0], strict=True):
        assert raw == (tiny_minitron / name).read_bytes()
        (tmp_path / name).write_bytes(raw)
    listed = subprocess.run(["sha256sum", *names], cwd=tmp_path, capture_output=True, check=True).stdout
    assert arrays["TOKENIZER_SHA256"].item() == hashlib.sha256(listed).hexdigest().encode()
    (tmp_path / "tokenizer_config.json").write_bytes(b"{}")
    assert TokenizerFiles(tmp_path).sha256.encode() != arrays["TOKENIZER_SHA256"].item()

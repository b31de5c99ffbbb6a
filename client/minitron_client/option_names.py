"""Names that callers try for sampling options: what the server's other inputs are, and how others call ours.

`SamplingParams` has a field for each input that changes an answer; an input without a field is here with the
reason, and a word of another API with the option that it means. It knows names and no values.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

_NO_BEAMS = "the server generates without beam search"
_NO_DECAY = "the engine does not change top_p while it generates"
_ONE_EACH = (
    "a completion is one sequence; give the prompt several times to generate_batch, each with its seed"
)
_NO_LOGITS = "a completion carries no logits; return_log_probs gives each token's log probability"
_COUNTED = "tokens are always counted; they are in usage"
_IN_PLACE = "it is a setting of the call, not of the sampling"

REFUSED_INPUTS: dict[str, str] = {
    "beam_width": _NO_BEAMS,
    "length_penalty": f"it ranks beams, and {_NO_BEAMS}",
    "len_penalty": f"it ranks beams, and {_NO_BEAMS}",
    "early_stopping": f"it ends beams, and {_NO_BEAMS}",
    "beam_search_diversity_rate": f"it spreads beams, and {_NO_BEAMS}",
    "runtime_top_p_min": _NO_DECAY,
    "runtime_top_p_decay": _NO_DECAY,
    "runtime_top_p_reset_ids": _NO_DECAY,
    "num_return_sequences": _ONE_EACH,
    "return_context_logits": _NO_LOGITS,
    "return_generation_logits": _NO_LOGITS,
    "return_num_input_tokens": _COUNTED,
    "return_num_output_tokens": _COUNTED,
    "embedding_bias": "give embedding_bias_words and embedding_bias_weights, to a model that takes text",
    "bad_words_list": "give bad_words, to a model that takes text",
    "stop_words_list": "give stop_words, to a model that takes text",
    "random_seed": "the server calls it seed now; give seed",
    "stop": "it ends a running request; close() of its stream does that. Texts that end are stop_words",
}
"""Inputs that the served models list and that are no options: why, and what to do instead."""

NOT_OFFERED: dict[str, str] = {
    "best_of": _ONE_EACH,
    "n": _ONE_EACH,
    "num_beams": _NO_BEAMS,
    "use_beam_search": _NO_BEAMS,
    "do_sample": "sampling is on where top_p or top_k is given, and off where neither is",
    "echo": "exclude_input_in_output=False puts the prompt in front of the text",
    "min_p": "the server has no such sampling",
    "typical_p": "the server has no such sampling",
    "logit_bias": "the server biases words: give embedding_bias_words and embedding_bias_weights",
    "ignore_eos": "give min_tokens: no text ends before so many tokens",
    "stop_token_ids": "give end_id, which takes one",
    "stream": f"{_IN_PLACE}: call stream() for pieces, generate() for the whole",
    "streaming": f"{_IN_PLACE}: call stream() for pieces, generate() for the whole",
    "timeout": f"{_IN_PLACE}: give timeout_s, in seconds",
}
"""Words of other APIs that mean no option of ours: why, and what to do instead."""

ALSO_CALLED: dict[str, str] = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_output_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "request_output_len": "max_tokens",
    "min_new_tokens": "min_tokens",
    "min_length": "min_tokens",
    "runtime_top_k": "top_k",
    "runtime_top_p": "top_p",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop_words",
    "stop_strings": "stop_words",
    "bad": "bad_words",
    "eos_token_id": "end_id",
    "pad_token_id": "pad_id",
    "log_probs": "return_log_probs",
    "logprobs": "return_log_probs",
    "top_logprobs": "return_log_probs",
    "output_log_probs": "return_log_probs",
    "token_ids": "return_output_ids",
    "output_ids": "return_output_ids",
    "return_token_ids": "return_output_ids",
    "priority": "priority_level",
}
"""Another API's or another model's name -> our option of the same meaning."""


def unknown_option(name: str, known: Collection[str]) -> str:
    """One sentence for a name that is no sampling option: why not, or which one was meant.

    Args:
        name: what the caller gave.
        known: names of the options.
    """
    reason = REFUSED_INPUTS.get(name) or NOT_OFFERED.get(name)
    if reason:
        return f"{name} is no sampling option: {reason}"
    close = [*difflib.get_close_matches(name, known, n=1, cutoff=0.75), ""]
    meant = ALSO_CALLED.get(name, close[0])
    guess = f"did you mean {meant}? " if meant else ""
    return f"unknown sampling option {name}; {guess}known: {', '.join(known)}"

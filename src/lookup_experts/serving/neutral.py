"""Fields that others' servers have and this one does not, and with what they ask for nothing.

OpenAI's API, and vLLM, SGLang, llama.cpp and their kin, have many fields, and clients send them
with the values that change nothing. Those are taken; anything else is refused by name, so that no
request is answered as if something had been heeded that was not.
"""

from typing import Any

MOST_FIELDS = 128
"""Of one object; more than any has."""

COMMON: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "bad_words": (),
    "cache_prompt": (True, False),
    "cache_salt": (),
    "dry_multiplier": (0,),
    "early_stopping": (),
    "echo": (),
    "frequency_penalty": (0,),
    "grammar": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "id_slot": (-1,),
    "include_stop_str_in_output": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": (),
    "mirostat": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "priority": (0,),
    "prompt_logprobs": (),
    "repeat_penalty": (1,),
    "return_token_ids": (),
    "return_tokens_as_token_ids": (),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "structured_outputs": (),
    "tfs_z": (1,),
    "top_a": (0,),
    "truncate_prompt_tokens": (),
    "typical_p": (1,),
    "use_beam_search": (),
    "vllm_xargs": (),
    "xtc_probability": (0,),
}
COMPLETION: dict[str, tuple[Any, ...]] = {
    **COMMON,
    "add_special_tokens": (True,),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "suffix": (),
}
CHAT: dict[str, tuple[Any, ...]] = {
    **COMMON,
    "add_generation_prompt": (True,),
    "add_special_tokens": (),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "documents": (),
    "function_call": ("none", "auto"),
    "functions": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "prediction": (),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "store": (),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def asks_for_nothing(value: Any, neutral: tuple[Any, ...] = ()) -> bool:
    """Null, an empty text, list or object, one of the neutral values of its field, or false, unless
    it is true that is neutral."""
    if value is None or value in ("", [], {}):
        return True
    if value is False:
        values = [one for one in neutral if isinstance(one, bool)]
        return not values or False in values
    return any(value == one and type(value) in (type(one), int, float) for one in neutral)

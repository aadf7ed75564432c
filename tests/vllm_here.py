"""vLLM in this process, and what its tokens are compared with: our own `generate`."""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB, gateless_model, greedy, randomize_experts, tiny_model

import lookup_experts as le

NEW_TOKENS = 12
CONTEXT = 128
Told = tuple[list[int], list[float]]
"""New ids and the logarithm of each one's probability."""


def mixed_prompts(number: int = 64, vocab_size: int = VOCAB, seed: int = 0) -> list[list[int]]:
    """Prompts of 1 to 100 ids, some of which begin alike."""
    chosen = random.Random(seed)
    beginning = [chosen.randrange(1, vocab_size) for _ in range(40)]
    prompts = []
    for index in range(number):
        own = [chosen.randrange(1, vocab_size) for _ in range(chosen.randint(1, 60))]
        prompts.append((beginning if index % 4 == 0 else []) + own)
    return prompts


def plain_model(family: str, **overrides: Any) -> Any:
    """A tiny random model with heads of 32 numbers, the narrowest that vLLM has on a CPU."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    if family == "gateless_llama":
        return gateless_model(**heads, **overrides)
    return tiny_model(family, head_dim=32, **heads, **overrides)


def model_with_experts(family: str = "llama", form: str = "mole", **overrides: Any) -> Any:
    """The same with experts that have something to say; of `meki` its rows are narrow."""
    settings: dict[str, Any] = {"form": form, "init": "normal"}
    settings |= {"row_size": 12} if form == "meki" else {"num_experts": 4, "expert_size": 16}
    model = le.attach(plain_model(family, **overrides), **settings)
    randomize_experts(model)
    return model.eval()


@contextmanager
def engine(folder: Path | str, **options: Any) -> Iterator[Any]:
    """vLLM's engine in this process with a folder of ours in float32.

    Steps have 64 tokens at most, so prompts come in chunks, and eight texts are under way at once.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    common = {
        "dtype": "float32",
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": 64,
        "max_num_seqs": 8,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    llm = LLM(str(folder), **{**common, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def vllm_greedy(llm: Any, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Told]:
    """What vLLM goes on with after each prompt, all asked for at once."""
    from vllm import SamplingParams

    greedy = SamplingParams(
        temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, detokenize=False
    )
    asked: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    return [told(answer.outputs[0]) for answer in llm.generate(asked, greedy, use_tqdm=False)]


def told(output: Any) -> Told:
    """Of one of vLLM's outputs."""
    ids = list(output.token_ids)
    return ids, [at[token].logprob for at, token in zip(output.logprobs, ids, strict=True)]


def our_greedy(folder: Path, prompts: list[list[int]], new_tokens: int = NEW_TOKENS) -> list[Told]:
    """What `generate` goes on with after each prompt, one after the other."""
    model = le.load(folder)
    found = []
    for prompt in prompts:
        ids = greedy(model, torch.tensor([prompt]), new_tokens)[0].tolist()
        found.append((ids, logprobs_of(model, prompt, ids)))
    return found


@torch.inference_mode()
def logprobs_of(model: Any, prompt: list[int], new_ids: list[int]) -> list[float]:
    """Of each new id after all before it, by one forward pass."""
    logits = model(torch.tensor([prompt + new_ids]), use_cache=False).logits[0]
    logprobs = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
    return logprobs.gather(1, torch.tensor(new_ids)[:, None])[:, 0].tolist()

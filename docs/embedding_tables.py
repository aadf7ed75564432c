"""Tables of models with embeddings in tables, beside the same models as transformers has them."""

from collections.abc import Sequence

from markdown_tables import Column, Result, megabytes, results_of, table


def embedding_steps(reports: Sequence[Result]) -> str:
    """A row for each system of `mole bench decode` and `prefill` of such a model."""
    columns: dict[str, Column] = {
        "": _what,
        "embeddings": "{system}",
        "ms": "{ms_per_step:,.1f}",
        "× resident?": "{ratio_to_resident:.3f}",
        "× mapped": _ratio_to_mapped,
        "rows alone, ms?": "{rows_ms:,.1f}",
        "rows alone, × mapped?": "{rows_ratio_to_mapped:.3f}",
        "cache?": megabytes("cache_bytes", ".0f"),
        "cache hits?": "{hit_rate:.0%}",
        "read?": megabytes("bytes_per_step"),
        "of it asked for?": "{share_wanted:.0%}",
    }
    return table(results_of(reports), columns)


def embedding_memory(reports: Sequence[Result]) -> str:
    """A row for each system of `mole bench memory` of such a model."""
    columns: dict[str, Column] = {
        "embeddings": "{system}",
        "the process holds": megabytes("resident_bytes", ",.0f"),
        "page cache besides": megabytes("page_cache_bytes", ",.0f"),
        "for the embeddings": megabytes("table_bytes_held", ",.0f"),
    }
    return table(results_of(reports), columns)


def _what(result: Result) -> str:
    is_decoding = result["what"] == "decode"
    words = [f"batch {result['batch']}" if is_decoding else f"{result['tokens']:,} tokens"]
    if result.get("cold"):
        words.append("the first prompt, nothing in the page cache")
    if "limit" in result:
        words.append(f"{result['limit']} beside the weights")
    return ", ".join(words)


def _ratio_to_mapped(result: Result) -> str:
    is_mapped = result["system"] == "mapped"
    return f"{1 if is_mapped else result['ratio_to_mapped']:.3f}"

"""`mole inspect`."""

from typing import Any

from lookup_experts import console
from lookup_experts.commands import options


def inspect(folder: options.ModelFolder, json: options.Json = False) -> None:
    """Tell what is in a model folder or a table.

    Reads headers alone, so it is quick for any size. `offloaded` is what generating would keep
    outside of the GPU: the table that experts become, or a mixture's experts; `loaded per token`
    is what each token needs of it.

    Example: `mole inspect out/ --json`
    """
    from lookup_experts.generation.inspection import inspect_folder

    console.quiet_transformers()
    described = inspect_folder(folder)
    if json:
        console.json_result(described)
    else:
        console.result(format_description(described))


_PARAMETER_LABELS = {
    "experts": "in experts",
    "table": "in the table",
    "readers": "of it reads rows",
}
"""Where a line of that name tells something else of them."""
_CHAT_TEMPLATE = {True: "yes", False: "no", None: "no tokenizer"}


def format_description(described: dict[str, Any]) -> str:
    """The same for a person."""
    from lookup_experts.units import format_bytes

    lines = [described["folder"], f"  form            {described['form']}"]
    if "backbone" in described:
        context, template = described["context"], described["chat_template"]
        lines += [
            f"  backbone        {described['backbone']} ({described['format']} format)",
            f"  context         {'not stated' if context is None else f'{context:,} tokens'}",
            f"  dtype           {', '.join(described['dtypes'])}",
            f"  chat template   {_CHAT_TEMPLATE[template]}",
        ]
    settings = described.get("lookup_experts")
    if settings:
        rows, layers = described["rows"], len(settings["layers"])
        lines += [
            f"  rows            {rows['form']}, {rows['size']:,} numbers each, "
            f"{settings['num_experts']} per token id and layer",
            f"  experts         {settings['num_experts']} {settings['expert_kind']} experts of "
            f"size {settings['expert_size']} in {layers} layers",
        ]
        if "backbone" in settings:
            lines.append(f"  on              {settings['backbone']['name']}")
    moe = described.get("moe")
    if moe:
        lines.append(
            f"  experts         {moe['num_experts_per_tok']} of {moe['num_experts']} experts of "
            f"size {moe['expert_size']} per token in {moe['num_layers']} layers"
        )
    for name, count in described.get("parameters", {}).items():
        if count:
            label = _PARAMETER_LABELS.get(name, name.replace("_", " "))
            lines.append(f"  {label:<15} {count:,} parameters")
    table = described.get("table")
    if table:
        shape = table["shape"]
        lines += [
            f"  table           {format_bytes(table['table_bytes'])}, {table['encoding']}, "
            f"{table['shards']} shards",
            f"  record          {format_bytes(table['record_bytes'])} for each of "
            f"{shape['vocab_size']:,} token ids",
            f"  fingerprint     {table['fingerprint']}",
        ]
        if table["tokens_counted"] is not None:
            lines.append(f"  counted         {table['tokens_counted']:,} tokens, for row caches")
    for name, table in (described.get("embeddings") or {}).items():
        lines.append(
            f"  {name}: {table['shape']['vocab_size']:,} records of "
            f"{format_bytes(table['record_bytes'])}, {format_bytes(table['table_bytes'])}, "
            f"{table['encoding']}"
        )
    return "\n".join(lines)

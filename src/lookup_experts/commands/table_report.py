"""What `reparameterize` and `reencode` say of the table that they made."""

from pathlib import Path
from typing import TYPE_CHECKING

from lookup_experts import console

if TYPE_CHECKING:
    from lookup_experts.evaluation.quality import Quality
    from lookup_experts.table.opening import Table


def report_table(out: Path, table: "Table", quality: "Quality", json: bool) -> None:
    """Print the result: one JSON object, or lines for a person."""
    from lookup_experts.evaluation.quality import format_quality
    from lookup_experts.units import format_bytes

    layout = table.layout
    if json:
        console.json_result(
            {
                "folder": str(out),
                "records": layout.shape.vocab_size,
                "record_bytes": layout.record_bytes,
                "table_bytes": layout.table_bytes,
                "encoding": layout.encoding.name,
                "fingerprint": table.manifest.fingerprint,
                "quality": quality.to_dict(),
            }
        )
    else:
        console.result(
            f"{out}: {layout.shape.vocab_size} records of {format_bytes(layout.record_bytes)}, "
            f"{format_bytes(layout.table_bytes)} in all, {layout.encoding.name}"
        )
        console.result(format_quality(quality))

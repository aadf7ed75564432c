"""`mole verify`."""

from lookup_experts import console
from lookup_experts.commands import options
from lookup_experts.errors import TableError


def verify(
    folder: options.ModelFolder,
    trust_remote_code: options.TrustRemoteCode = False,
    json: options.Json = False,
) -> None:
    """Check that a table is intact and belongs to its model.

    Reads every record once; exit code 2 if anything is wrong.

    Example: `mole verify out/`
    """
    from lookup_experts.generation.inspection import verify_folder
    from lookup_experts.units import format_bytes

    console.quiet_transformers()
    with console.progress_bar("Verifying") as progress:
        found = verify_folder(folder, progress, trust_remote_code)
    if json:
        console.json_result(found.to_dict())
    if found.problems:
        raise TableError(f"{found.folder}: {'; '.join(found.problems)}.")
    if not json:
        report = found.report
        console.result(
            f"{found.folder}: all {report.num_ids} records are intact "
            f"({format_bytes(report.num_bytes)} in {report.seconds:.1f} s)"
            + (", and the table belongs to the model." if found.matches_model else ".")
        )

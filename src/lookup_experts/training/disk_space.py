"""Enough room for a run on its disk, before it begins and while it writes."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from lookup_experts.errors import DiskFullError, UserError
from lookup_experts.training.checkpoints import clear_unfinished, last_checkpoint
from lookup_experts.training.models import ParameterCounts
from lookup_experts.training.recipe import RecipeFile
from lookup_experts.training.run_folder import RunFolder
from lookup_experts.units import format_bytes

# float32 weights, and in a checkpoint AdamW's two moments beside them.
_MODEL_BYTES_PER_PARAMETER = 4
_CHECKPOINT_BYTES_PER_PARAMETER = 12
# With this little left, a write that failed without saying why failed for want of room.
_FULL_BELOW_BYTES = 1 << 20


def check_disk_space(run: RunFolder, recipe: RecipeFile, parameters: ParameterCounts) -> None:
    """Refuse to begin a run whose checkpoints and model won't fit on the disk.

    What the run's folder holds already counts as room.
    """
    num_checkpoints = recipe.training.keep_checkpoints + 1  # one more while it is written
    needed = (
        num_checkpoints * _CHECKPOINT_BYTES_PER_PARAMETER * parameters.trained
        + _MODEL_BYTES_PER_PARAMETER * parameters.total
    )
    free = shutil.disk_usage(run.path).free
    held = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file())
    if free + held < needed:
        raise DiskFullError(
            f"{num_checkpoints} checkpoints and the model need about {format_bytes(needed)} in "
            f"{run.path}, {format_bytes(free)} are free. Free some space, lower "
            "training.keep_checkpoints, or choose an --out on another disk."
        )


@contextmanager
def told_when_disk_is_full(run: RunFolder) -> Iterator[None]:
    """Turn the many errors of writing to a full disk into one, and remove what was half written."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not (says_disk_full(error) or shutil.disk_usage(run.path).free < _FULL_BELOW_BYTES):
            raise
        clear_unfinished(run.checkpoints)
        clear_unfinished(run.path)
        last = last_checkpoint(run.checkpoints)
        kept = f"The last checkpoint, {last}, is kept" if last else "There is no checkpoint yet"
        raise DiskFullError(
            f"The disk of {run.path} is full. {kept}; free some space and run the same command "
            "again."
        ) from error


def says_disk_full(error: BaseException | None) -> bool:
    """Whether an error comes from a full disk.

    safetensors and torch wrap the system's error in their own, as a text or as a cause.
    """
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

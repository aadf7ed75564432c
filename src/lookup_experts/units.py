"""Sizes of memory and files, in and out of words."""

import re

from lookup_experts.errors import UserError

_FACTORS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


def parse_bytes(size: int | str) -> int:
    """A number of bytes from `256MB`, `1.5 GiB`, `0` or an int; MB is 10^6, MiB is 2^20."""
    if isinstance(size, int):
        number, unit = float(size), ""
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", size)
        if match is None or match[2].lower() not in _FACTORS:
            raise UserError(f"{size!r} is no size in bytes; write it like 256MB, 1.5GiB or 0.")
        number, unit = float(match[1]), match[2].lower()
    if number < 0:
        raise UserError(f"A size in bytes can't be negative; got {size}.")
    return int(number * _FACTORS[unit])


def format_bytes(num_bytes: float) -> str:
    """`73.7 kB`, `3.71 GB`: three digits, powers of ten."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(num_bytes) < 1000 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.3g} {unit}"

"""What the C library does with the memory of tensors that are no longer needed."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 2**25
"""glibc takes no larger one for `M_MMAP_THRESHOLD`."""
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next tensors, from now on, in this process.

    glibc gives large blocks back to the kernel and takes them anew, page fault by page fault,
    depending on what sizes were freed before. A GELU on a prompt then takes twice as long in one
    model as in another for no reason of its own, so what is to be compared must not leave it to
    chance; and a server, whose prompts come again and again, takes the pages once. Other C
    libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)

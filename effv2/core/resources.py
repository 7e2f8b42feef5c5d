"""A memory or a disk that is full, told in one sentence with what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from effv2.core.errors import RunError


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether there was no memory left; torch's CPU allocator has no error class of its own."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextmanager
def what_ran_out(settings: str = "--batch-size or --image-size") -> Iterator[None]:
    """Raise RunError where memory or disk run out inside; `settings` are those that say how much memory is needed."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if is_out_of_memory(error):
            raise RunError(f"The device's memory is full; lower {settings}.") from error
        # torch's writer makes a RuntimeError of a disk that is full.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {cause.filename}" if cause.filename else ""
        raise RunError(f"The disk is full{where}; free space.", resumes=True) from error

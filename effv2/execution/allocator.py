"""How the process gets its memory: large blocks are kept, where glibc would give each back and fault it in anew.

EFFV2_ALLOCATOR=system leaves everything as it is.
"""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's parameters (malloc.h) and what they are set to.
SETTINGS = {
    -4: 0,  # M_MMAP_MAX: no block has a mapping of its own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD: hardly anything is given back
    -2: 64 * 2**20,  # M_TOP_PAD: what the heap grows by
}


def tune_allocator() -> None:
    """Set glibc's allocator, before torch's first tensor. Elsewhere nothing is done."""
    if os.environ.get("EFFV2_ALLOCATOR") != "system" and sys.platform.startswith("linux"):
        if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
            for parameter, value in SETTINGS.items():
                mallopt(parameter, value)

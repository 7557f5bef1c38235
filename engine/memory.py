"""Memory that is free, but kept by those who freed it: let it go."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys

import torch


def give_back_memory() -> None:
    """Collect garbage, and where torch on a GPU or the C library (glibc) would keep what was freed, make it let go."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def give_back_pages(storage: torch.UntypedStorage) -> None:
    """Let go of the whole pages of memory that was mapped from a file, whoever still refers to it."""
    if sys.platform != "linux" or storage.device.type != "cpu":
        return
    start = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)

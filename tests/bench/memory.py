"""What Linux says of a process's memory, and what a run takes beside what is resident. Knows nothing of what runs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def resident_mb(pid: int | str = "self") -> float:
    return _status_mb(pid, "VmRSS")


def peak_mb(pid: int | str = "self") -> float:
    """The most that was resident since `forget_peak`, or since the process began."""
    return _status_mb(pid, "VmHWM")


def forget_peak(pid: int | str = "self") -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def give_back_freed() -> None:
    """Of this process, to the kernel: what glibc keeps of earlier runs would hide what the next one takes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def taken_mb(run: Callable[[], object]) -> float:
    """What one run takes at its peak, beside what is resident before. To be called when the run is warm."""
    give_back_freed()
    forget_peak()
    before_mb = resident_mb()
    run()
    return peak_mb() - before_mb


def _status_mb(pid: int | str, name: str) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no {name}")

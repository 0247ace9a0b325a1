"""What a benchmark ran on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch
import transformers


def describe(threads: int, dtype: str = "float32") -> str:
    """Processor, cores, threads, number format and versions."""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{_processor()}, {threads} threads, {dtype}, {versions}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()}, {os.cpu_count()} cores"
    return platform.processor() or "unknown processor"

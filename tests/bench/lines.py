"""Questions to a process of a benchmark, and its answers: a line of JSON each. Knows nothing of what is asked."""

from __future__ import annotations

import json
import subprocess
from typing import Any


def ask(process: subprocess.Popen[str], question: dict[str, Any], name: str) -> dict[str, Any]:
    """Raises RuntimeError where the process, called `name`, has ended."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"the process of {name} ended")
    answer: dict[str, Any] = json.loads(line)
    return answer

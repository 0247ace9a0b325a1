"""Bulk work holds a window of its file, and never the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.serving import ROOT

MEASURED = """
import json, resource, sys
from types import SimpleNamespace
from app import cli

async def predict(inputs, tasks, truncate, **_):
    answer = {"version": 1, "arm": "champion", "label": "ham", "score": 0.9, "scores": {"ham": 0.9, "spam": 0.1}}
    return SimpleNamespace(results=[{"spam": answer} for _ in inputs], generation=1)

cli._open_runtime = lambda settings: SimpleNamespace(
    inference=SimpleNamespace(predict=predict), close=lambda: None
)
peaks = []
for rows in (70_000, 250_000):
    source, out = (f"{sys.argv[1]}/{rows}{end}" for end in (".jsonl", ".parquet"))
    with open(source, "w") as file:
        file.writelines(f'{{"id":{number},"text":"{number}{" word" * 50}"}}\\n' for number in range(rows))
    assert cli.main(["predict", "--file", source, "--out", out, "--in-process"]) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """180,000 rows more are 45 MB as text, and more than 200 with the answers, as the objects that they are in between.

    Both have row groups of full size.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "MANIFOLD_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    small, large = json.loads(done.stdout.splitlines()[-1])
    assert large - small < 80e6, (small, large)

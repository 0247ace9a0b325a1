"""The reports that lie here, in one: what each measures, and its verdict on every target. Writes REPORT.md.

Measures nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
REPORT = HERE / "REPORT.md"
REPORTS = {
    "LIMITS": "bench-limits",
    "FANOUT": "bench-fanout",
    "SERVING": "bench-serving",
    "GROWTH": "bench-growth",
    "SOAK": "bench-soak",
    "SWAPS": "bench-swaps",
    "GPU": "bench-gpu",
    "LEARNING": "bench-learning",
    "PACKING": "bench-packing",
    "FEWLABELS": "bench-few-labels",
}
_VERDICT = re.compile(r"\bmet\b")


def write_report() -> str:
    found = {name: HERE / f"{name}.md" for name in REPORTS}
    there = {name: path.read_text().splitlines() for name, path in found.items() if path.exists()}
    lines = [
        "# What was measured",
        "",
        "Each report is written by its command, states its machine and measures everything that it compares side by "
        "side. `make bench` runs the first four (most of an hour on two quiet cores) and writes this page; "
        "`make bench-peers` once before it installs what they compare with.",
        "",
        "| report | command | of |",
        "|---|---|---|",
    ]
    for name, text in there.items():
        title = text[0].removeprefix("# ")
        lines.append(f"| [{title}]({name}.md) | `make {REPORTS[name]}` | {_conditions(text)} |")
    verdicts = {name: [line for line in text if _VERDICT.search(line)] for name, text in there.items()}
    all_lines = [line for of_report in verdicts.values() for line in of_report]
    missed = sum("**not met**" in line for line in all_lines)
    lines += ["", f"Of {len(all_lines)} verdicts on targets {missed} are “not met”.", ""]
    for name, of_report in verdicts.items():
        if of_report:
            lines += [f"## {there[name][0].removeprefix('# ')}", "", *_shown(of_report), ""]
    return "\n".join(lines)


def _conditions(text: list[str]) -> str:
    """The date and the machine: the first line that begins with a date, up to the command."""
    line = next((line for line in text if re.match(r"\d{4}-\d{2}-\d{2}", line)), "–")
    return line.split(". Written")[0]


def _shown(verdicts: list[str]) -> list[str]:
    """Lines of tables as they are, under one empty head; sentences as a list."""
    rows = [line for line in verdicts if line.startswith("|")]
    columns = max((line.count("|") for line in rows), default=0) - 1
    padded = [line + " |" * (columns + 1 - line.count("|")) for line in rows]
    table = ["|" + " |" * columns, "|" + "---|" * columns, *padded] if rows else []
    return table + [f"- {line.removeprefix('- ')}" for line in verdicts if not line.startswith("|")]


def main() -> None:
    REPORT.write_text(write_report())
    print(f"written: {REPORT}")


if __name__ == "__main__":
    main()

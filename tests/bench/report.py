"""The reports that lie here, in one: what each measures, and its verdict on every target. Writes REPORT.md.

Measures nothing.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
REPORT = HERE / "REPORT.md"
REPORTS = {
    "LIMITS": "bench-limits",
    "FANOUT": "bench-fanout",
    "SERVING": "bench-serving",
    "GROWTH": "bench-growth",
    "SOAK": "bench-soak",
    "PROFILE": "bench-profile",
    "INT8": "bench-int8",
    "SWAPS": "bench-swaps",
    "WATCHING": "bench-watching",
    "GPU": "bench-gpu",
    "LEARNING": "bench-learning",
    "PACKING": "bench-packing",
    "MATCHING": "bench-matching",
    "FEWLABELS": "bench-few-labels",
    "DRIFT": "bench-drift",
}
WHAT_STANDS_IN_THE_WAY = """## What stands in the way

- **OpenVINO at 1 × 32 in bfloat16.** [PROFILE.md](PROFILE.md): 72 % of the time is the twenty-four products (oneDNN,
  packed weights), 9 % attention, the rest some forty small operators, none above 3 %. A batch of one short text reads
  every weight once. To close it the layers would have to run in OpenVINO itself, which cannot fork rows in mid-stack or
  take prefixes.
- **infinity on ONNX Runtime with 64 at once.** The engine is faster than ONNX Runtime there (LIMITS.md, 32 × 64),
  and with 64 callers it is at work 92 to 96 % of the time, in batches of 32 ([PROFILE.md](PROFILE.md)): no more
  than 4 % lie between batches at 64 tokens. Batches that end at 640, 1,024 or 2,048 tokens brought 0.95 to 1.08
  times the throughput in one run, 0.99 to 1.03 in another. What is missing beyond that is what single rounds move,
  a tenth and more: the run has Manifold at 93 texts/s in this cell, and at 113 in the same cell of its own table a
  quarter of an hour before.
- **Latency − engine.** The end of [PROFILE.md](PROFILE.md): 1.4 ms at 16 tokens, 1.6 at 64, 2.3 at 256 (1.7 to 2.9 in
  the longer run of SERVING.md, in a slower hour). Tokenizing grows with the text, 0.3 to 0.9 ms in the tokenizers
  library; the socket and the client are 0.4 to 0.5; 0.7 to 0.8 are HTTP and the way through two threads, whose code a
  batch has driven out of the processor's caches. At 64 tokens the whole latency is below that of a bare forward alone.
- **Eight tasks against AdapterHub's `Parallel` from layer 4.** It shares the layers below as Manifold does, so
  planned passes are equal and only the rest can differ. Against whole models and switched adapters the factors are
  met.
- **512 permits under overload.** A permit is a place in the queue: 512 of them are seconds. The default is for
  bursts. With 12, the p99 at 70 % is kept; at three times saturation 93 requests a second are answered, not 112, as
  the event loop refuses 245 others on the same two cores, and so the accepted p99 is 155 ms for 118.
- **p99 while versions are loaded on a GPU.** The four clients of that measurement, the engine and the loader share
  one Python interpreter; loading takes 2 to 3 ms of it per version. On the device the copies have a stream of their
  own.
- **Watching.** What it adds to a request's processor time is two and a half percent ([WATCHING.md](WATCHING.md)). But
  two cores run the layers in step: what is taken from one is waited for on the other, so that with one answer of 16
  tokens throughput gives up twice that. Lines, spans and rows are made in Python: with one answer in 11 µs a request
  when nothing else runs, which are 35 to 50 beside two threads that keep both cores busy. Threads that burn a fixed
  share of a core took one and a half times that share of throughput, whether they held the interpreter for long, let go
  of it each 50 to 200 µs, or were another process. Lower priorities, a shorter switch interval of the interpreter, and
  longer and shorter intervals of the threads that write, brought nothing that throughput shows.

## What was measured and left out

- **int8 weights.** [INT8.md](INT8.md): torchao's weight-only kind moves scores by up to 0.06 and is slower; with int8
  activations it moves them by up to 0.11, and is a tenth faster from 8 × 128 on, slower below. Allowed is 0.01.
- **A shorter wait of OpenMP's helpers** (`GOMP_SPINCOUNT` 10,000 and 50,000, so that they leave the processor to the
  event loop sooner): p50 alone within 2 %, throughput 0.88 to 1.05 times, without a direction.
- **Compiled layers.** [LIMITS.md](LIMITS.md): the fused layers are faster than inductor's in every cell.
- **Trunk states of a text seen a moment ago.** [FANOUT.md](FANOUT.md), 8 × 32: a second task with an own prefix from
  layer 4 costs 0.27 of a bare forward beside the first and 0.71 in a request of its own; a second readout 0.01 to 0.1
  and 0.73. A caller has that gain today by naming both tasks in one request. To give it to two requests would take
  0.7 MB a text of 64 tokens (seven layers in float32), so 64 MB would remember ninety texts.
- **Two lanes on two cores**: batches side by side, each on a core of its own, where several texts wait, since cores
  that share each operator wait for one another at its end. The layers alone run 1.07 to 1.30 times as fast (float32, 2
  to 128 texts), the server with 64 callers 1.04 to 1.09 times, with a p99 a tenth higher; but with 2 and 8 callers,
  where it goes to and fro between one lane and two, 0.62 and 0.77 times at 16 tokens, 0.87 and 0.99 at 64.
- **Variable-length packing on CUDA.** A queue of mixed lengths (8 to 256 tokens, half of them up to 40) is scheduled
  into batches of which 11 to 16 % are padding, so packing could save that much at most; the copies that leave it out
  would move 24 kB a token and layer at d = 1,024, by the card's figures a tenth of the time of that token's products
  (reckoned, not run). On a CPU, where it pays, padding goes through no product.
"""
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
    verdicts = {name: _verdicts(text) for name, text in there.items()}
    all_lines = [line for of_report in verdicts.values() for _, line in of_report]
    missed = sum("**not met**" in line for line in all_lines)
    lines += ["", f"Of {len(all_lines)} verdicts on targets {missed} are “not met”.", ""]
    for name, of_report in verdicts.items():
        if of_report:
            lines += [f"## {there[name][0].removeprefix('# ')}", "", *_shown(of_report), ""]
    return "\n".join([*lines, WHAT_STANDS_IN_THE_WAY])


def _conditions(text: list[str]) -> str:
    """The date and the machine: the first line that begins with a date, up to the command."""
    line = next((line for line in text if re.match(r"\d{4}-\d{2}-\d{2}", line)), "–")
    return line.split(". Written")[0]


def _verdicts(text: list[str]) -> list[tuple[str, str]]:
    """Lines with a verdict, each with the head of the table that it stands in; "": in none."""
    found, head = [], ""
    for line, following in zip(text, [*text[1:], ""], strict=True):
        if following.startswith("|") and set(following) <= set("|-: "):
            head = line
        elif not line.startswith("|"):
            head = ""
        if _VERDICT.search(line) and line != head:
            found.append((head, line))
    return found


def _shown(verdicts: list[tuple[str, str]]) -> list[str]:
    """Lines of tables under their heads; sentences as a list."""
    lines = []
    for head, group in groupby(verdicts, key=lambda verdict: verdict[0]):
        if head:
            lines += [head, "|" + "---|" * (head.count("|") - 1), *(line for _, line in group), ""]
        else:
            lines += [*(f"- {line.removeprefix('- ')}" for _, line in group), ""]
    return lines[:-1]


def main() -> None:
    REPORT.write_text(write_report())
    print(f"written: {REPORT}")


if __name__ == "__main__":
    main()

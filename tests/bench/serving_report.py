"""The report of `make bench-serving`: targets first, then the tables they come from, as Markdown; and two drawings.

Knows rows; measures nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from html import escape

from tests.bench.load_texts import LENGTHS, MIXED
from tests.bench.serving_artifacts import FIRST_LAYER, HEADS, JOBS, PREFIXES, READOUT, TASKS
from tests.bench.serving_results import Results, Row, Stream, median
from tests.bench.serving_servers import MANIFOLD, SEVERAL_TASKS

SHARE, FLOOD = 0.7, 3.0
_REFUSAL_MS = 20.0


def report(results: Results) -> str:
    parts = [_head(results), _targets(results), _over_bare(results), _latencies(results), _alone(results)]
    parts += [_streams(results), _one_task(results), _several(results), _half(results), _conditions(results)]
    return "\n".join(part for part in parts if part)


def _head(results: Results) -> str:
    c = results.conditions
    return (
        "# Serving: Manifold's server under load, over the bare encoder and beside its peers\n\n"
        f"{c['date']}, {c['machine']}. Written by `make bench-serving` in {c['minutes']} minutes: the medians of "
        f"{c['rounds']} rounds, in brackets the smallest and largest round. The backbone is all-MiniLM-L6-v2.\n"
    )


# -- targets -----------------------------------------------------------------------------------------------------------


def _targets(results: Results) -> str:
    lines = ["## Targets\n", "| target | measured | |", "|---|---|---|"]
    for target, measured, is_met in _verdicts(results):
        lines.append(f"| {target} | {measured} | {'met' if is_met else '**not met**'} |")
    return "\n".join(lines) + "\n"


def _verdicts(results: Results) -> Iterator[tuple[str, str, bool]]:
    for texts, least in (("64", 0.90), ("256", 0.90), (MIXED, 0.90), ("16", 0.75)):
        rows = results.cell("manifold", MANIFOLD, READOUT.name, texts, 64)
        if rows:
            ratio = median(rows, _ratio)
            what = f"one task, {_tokens(texts)}, 64 at once: ≥ {least:.2f} × the bare limit"
            yield what, f"{ratio:.2f}{_spread([_ratio(r) for r in rows])}", ratio >= least
    yield from _beside_verdicts(results)
    yield from _peer_verdicts(results)
    yield from _stream_verdicts(results)


def _beside_verdicts(results: Results) -> Iterator[tuple[str, str, bool]]:
    alone = [a for a in results.alone if a.job == READOUT.name]
    if alone:
        worst = max(median([a for a in alone if a.texts == t], lambda a: a.beside_ms) for t in {a.texts for a in alone})
        what = "one at a time: latency − engine time ≤ 1.5 ms (p50, the worst length)"
        yield what, f"{worst:.2f} ms", worst <= 1.5
    mine, others = _beside_model(results, MANIFOLD), []
    for name in ("LitServe", "infinity"):
        if (theirs := _beside_model(results, name)) is not None:
            others.append((name, theirs))
    if mine is not None and others:
        told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in others)
        what = "one at a time: p50 − a bare forward of one text, below LitServe's and infinity's"
        yield what, f"{mine:.1f} ms; {told}", all(mine < ms for _, ms in others)


def _peer_verdicts(results: Results) -> Iterator[tuple[str, str, bool]]:
    rates = _rates([r for r in results.rows if r.section == "one" and (r.texts, r.concurrency) == ("64", 64)])
    mine = rates.pop((MANIFOLD, READOUT.name), 0.0)
    if rates:
        (best, _), rate = max(rates.items(), key=lambda item: item[1])
        what = "one task, 64 tokens, 64 at once: above every peer"
        yield what, f"{mine / rate:.2f} × {best}, the best of {len(rates)}", mine > rate
    rates = _rates([r for r in results.rows if r.section == "several"])
    peers = {name: rate for (name, job), rate in rates.items() if job == SEVERAL_TASKS and rate}
    if not peers:
        return
    best = max(peers, key=peers.__getitem__)
    late = f"from layer {FIRST_LAYER}"  # AdapterHub's, where it forks where Manifold does: the same rows are computed
    rest = {name: rate for name, rate in peers.items() if late not in name}
    for job, least, what in (
        (PREFIXES, 2.2, f"eight tasks with prefixes from layer {FIRST_LAYER} of 6: ≥ 2.2 × the best peer"),
        (HEADS, 6.0, "eight heads on one combination: ≥ 6 × the best peer"),
    ):
        rate = rates.get((MANIFOLD, job.name), 0.0)
        told = f"{rate / peers[best]:.2f} × {best}"
        if rest and best not in rest:
            other = max(rest, key=rest.__getitem__)
            told += f"; {rate / rest[other]:.2f} × {other}, the best that shares no layers"
        yield what, told, rate >= least * peers[best]


def _stream_verdicts(results: Results) -> Iterator[tuple[str, str, bool]]:
    for permits in sorted({s.permits for s in results.streams}, reverse=True):
        calm = [s for s in results.streams if (s.permits, s.share) == (permits, SHARE)]
        flood = [s for s in results.streams if (s.permits, s.share) == (permits, FLOOD)]
        if not calm or not flood:
            continue
        ratio, limit_ms = median(calm, lambda s: s.p99_ms / s.p50_ms), 3 * median(calm, lambda s: s.p50_ms)
        what = f"{permits} permits, 70 % of saturation: p99 ≤ 3 × p50"
        yield what, f"{ratio:.1f} × ({_calm(calm)})", ratio <= 3
        p99_ms, refusal_ms = median(flood, lambda s: s.p99_ms), median(flood, lambda s: s.refusal_p99_ms)
        what = f"{permits} permits, 3 × saturation: accepted p99 ≤ 3 × that p50, 429 within {_REFUSAL_MS:g} ms (p99)"
        told = f"accepted p99 {p99_ms:.0f} ms (allowed {limit_ms:.0f}), 429 p99 {refusal_ms:.1f} ms"
        yield what, told, p99_ms <= limit_ms and refusal_ms <= _REFUSAL_MS and not any(s.failed for s in flood)


def _calm(streams: Sequence[Stream]) -> str:
    return f"{median(streams, lambda s: s.p99_ms):.0f} over {median(streams, lambda s: s.p50_ms):.0f} ms"


def _beside_model(results: Results, server: str) -> float | None:
    rows = [r for r in results.rows if (r.section, r.server, r.texts, r.concurrency) == ("one", server, "64", 1)]
    return median(rows, lambda r: r.p50_ms - r.bare_one_ms) if rows else None


# -- tables ------------------------------------------------------------------------------------------------------------


def _over_bare(results: Results) -> str:
    rows = [r for r in results.rows if r.section == "manifold"]
    lengths, most = list(dict.fromkeys(r.texts for r in rows)), max(r.concurrency for r in rows)
    bare = [f"{median([r for r in rows if r.texts == t], lambda r: r.bare_texts_s):.0f}" for t in lengths]
    best = [f"{results.best_batch[t]}" for t in lengths]
    lines = [
        "## The server over the bare limit\n",
        f"Texts a second with {most} requests at once, one text each, over those of the bare encoder "
        "(transformers, fused attention, tokenized texts in batches of its best size) right before and after.\n",
        "| | passes | " + " | ".join(map(_tokens, lengths)) + " |",
        "|---|---" + "|---" * len(lengths) + "|",
        "| bare encoder, texts/s (batch) | 1.00 | "
        + " | ".join(f"{b} ({n})" for b, n in zip(bare, best, strict=True))
        + " |",
    ]
    for job in JOBS:
        cells = [results.cell("manifold", MANIFOLD, job.name, t, most) for t in lengths]
        if any(cells):
            entries = [f"{median(c, _ratio):.2f}{_spread([_ratio(r) for r in c])}" if c else "–" for c in cells]
            lines.append(f"| {job.name} | {job.passes:.2f} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def _latencies(results: Results) -> str:
    lines = [
        "## Latencies\n",
        "Closed loop: each caller asks again when its answer is there. p50, p95, p99 in milliseconds.\n",
        "| | texts | at once | texts/s | over bare | p50 | p95 | p99 | failed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cells = {(r.job, r.texts, r.concurrency) for r in results.rows if r.section == "manifold"}
    order = [job.name for job in JOBS]
    for job, texts, concurrency in sorted(cells, key=lambda c: (order.index(c[0]), LENGTHS.index(c[1]), c[2])):
        rows = results.cell("manifold", MANIFOLD, job, texts, concurrency)
        lines.append(
            f"| {job} | {_tokens(texts)} | {concurrency} | {_rate(rows)} | {median(rows, _ratio):.2f} | {_tail(rows)} |"
        )
    return "\n".join(lines) + "\n"


def _alone(results: Results) -> str:
    lines = [
        "## Beside the engine\n",
        "One caller on one connection; medians in milliseconds. The engine's time is the header `x-inference-time`.\n",
        "| | texts | latency | engine | latency − engine |",
        "|---|---|---|---|---|",
    ]
    for job, texts in dict.fromkeys((a.job, a.texts) for a in results.alone):
        rows = [a for a in results.alone if (a.job, a.texts) == (job, texts)]
        latency, engine = median(rows, lambda a: a.latency_ms), median(rows, lambda a: a.engine_ms)
        beside = [a.beside_ms for a in rows]
        lines.append(
            f"| {job} | {_tokens(texts)} | {latency:.2f} | {engine:.2f} | "
            f"{statistics.median(beside):.2f}{_spread(beside)} |"
        )
    return "\n".join(lines) + "\n"


def _streams(results: Results) -> str:
    lines = [
        "## Open loop\n",
        f"{READOUT.name}, 64 tokens. Requests come when they are due (a Poisson stream), whatever the server does; "
        "times count from then. Saturation is the rate with 64 callers. 512 permits are the default; the other number "
        "is what `max_concurrent_requests` must be for waiting to end within twice the p50 at 70 %.\n",
        "| permits | rate | sent | accepted | 429 | failed | p50 | p99 | 429's p50 | 429's p99 | generator late, p99 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for permits, share in sorted({(s.permits, s.share) for s in results.streams}, key=lambda k: (-k[0], k[1])):
        rows = [s for s in results.streams if (s.permits, s.share) == (permits, share)]
        counts = [
            sum(values) for values in zip(*((s.sent, s.accepted, s.refused, s.failed) for s in rows), strict=True)
        ]
        times = [
            median(rows, of)
            for of in (
                lambda s: s.p50_ms,
                lambda s: s.p99_ms,
                lambda s: s.refusal_p50_ms,
                lambda s: s.refusal_p99_ms,
                lambda s: s.late_p99_ms,
            )
        ]
        told = [f"{ms:.1f} ms" if ms else "–" for ms in times]
        rate = f"{share:g} × saturation: {rows[0].rate_s:.0f}/s"
        lines.append("| " + " | ".join([str(permits), rate, *map(str, counts), *told]) + " |")
    return "\n".join(lines) + "\n"


def _one_task(results: Results) -> str:
    rows = [r for r in results.rows if r.section == "one"]
    if not rows:
        return ""
    cells = list(dict.fromkeys((r.texts, r.concurrency) for r in rows))
    lines = [
        "## One task, beside peers\n",
        f"The same texts and generator; servers take turns, in {len({r.round for r in rows})} rounds. "
        "A task is a classifier of four labels: for Manifold "
        "a readout of the bare trunk, for the others a fine-tuned model's head. Texts a second; last, p50, p95, p99 "
        "with one caller and how much of the p50 is not a bare forward of one text.\n",
        "| | "
        + " | ".join(f"{_tokens(t)}, {c} at once" for t, c in cells)
        + " | p50, p95, p99 alone | beside the model |",
        "|---" * (len(cells) + 3) + "|",
    ]
    for server in dict.fromkeys(r.server for r in rows):
        of = [[r for r in rows if (r.server, r.texts, r.concurrency) == (server, *cell)] for cell in cells]
        entries = [_rate(c) if c else "–" for c in of]
        alone = next((c for c, (_, concurrency) in zip(of, cells, strict=True) if c and concurrency == 1), None)
        tail = _tail(alone).rsplit(" | ", 1)[0].replace(" | ", ", ") + " ms" if alone else "–"
        beside = _beside_model(results, server)
        entries += [tail, "–" if beside is None else f"{beside:.1f} ms"]
        lines.append(f"| {_bold(server)} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n" + _drawing("serving-one.svg", rows)


def _several(results: Results) -> str:
    rows = [r for r in results.rows if r.section == "several"]
    if not rows:
        return ""
    lines = [
        f"## {TASKS} tasks a text, beside peers\n",
        f"64 tokens, {rows[0].concurrency} texts at once. Texts a second with all {TASKS} answers. infinity "
        "answers a model a request, so a text is eight requests; its latencies are of one. "
        "Peers with whole models and PEFT's run a forward a task; AdapterHub's rows part where prefixes begin.\n",
        "| | texts/s | over bare | p50 | p95 | p99 | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for server, job in dict.fromkeys((r.server, r.job) for r in rows):
        of = [r for r in rows if (r.server, r.job) == (server, job)]
        name = f"**{MANIFOLD}: {job}**" if server == MANIFOLD else server
        lines.append(f"| {name} | {_rate(of)} | {median(of, _ratio):.2f} | {_tail(of)} |")
    return "\n".join(lines) + "\n" + _drawing("serving-several.svg", rows)


def _half(results: Results) -> str:
    rows = [r for r in results.rows if r.section == "half"]
    if not rows:
        return ""
    bare = median(rows, lambda r: r.bare_texts_s)
    lines = [
        "## One task in bfloat16\n",
        f"64 tokens, 64 at once. The bare encoder: {bare:.0f} texts/s.\n",
        "| | texts/s | over bare | p50 | p95 | p99 | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for server in dict.fromkeys(r.server for r in rows):
        of = [r for r in rows if r.server == server]
        lines.append(f"| {_bold(server)} | {_rate(of)} | {median(of, _ratio):.2f} | {_tail(of)} |")
    return "\n".join(lines) + "\n"


def _conditions(results: Results) -> str:
    lines = [
        "## How\n",
        "- Closed loop: `wrk`, one thread, `tests/bench/load.lua`, on the same cores; the rate is the slope of answers "
        "over time behind the first answer of each connection, since answers come in bursts as large as a batch. "
        "Percentiles are wrk's.",
        "- Open loop and one caller alone: `tests/bench/load_open.py`, since wrk has no rate.",
        "- Texts: random words of the vocabulary, no two alike; mixed ones have 8 to 256 tokens, half up to 40.",
        "- Every process has the same threads and variables (OMP_WAIT_POLICY "
        f"{results.conditions['wait_policy']}); servers that are not asked are stopped (SIGSTOP).",
        "- Prefixes have 16 virtual tokens; a combination is eight of them from layer 3 on.",
        "",
        "| server | settings |",
        "|---|---|",
        *(f"| {'; '.join(names)} | {told} |" for told, names in _by_settings(results).items()),
    ]
    if results.failures:
        lines += [
            "",
            "Not measured:",
            "",
            *(f"- {name}: {_one_line(error)}" for name, error in results.failures.items()),
        ]
    return "\n".join(lines) + "\n"


def _by_settings(results: Results) -> dict[str, list[str]]:
    servers: dict[str, list[str]] = {}
    for name, told in results.settings.items():
        servers.setdefault(told, []).append(_bold(name))
    return servers


# -- entries -----------------------------------------------------------------------------------------------------------


def _ratio(row: Row) -> float:
    return row.texts_s / row.bare_texts_s


def _rates(rows: Sequence[Row]) -> dict[tuple[str, str], float]:
    keys = dict.fromkeys((r.server, r.job) for r in rows)
    return {key: median([r for r in rows if (r.server, r.job) == key], lambda r: r.texts_s) for key in keys}


def _rate(rows: Sequence[Row]) -> str:
    return f"{median(rows, lambda r: r.texts_s):.1f}{_spread([r.texts_s for r in rows], 1)}"


def _spread(values: Sequence[float], digits: int = 2) -> str:
    return f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""


def _tail(rows: Sequence[Row]) -> str:
    of: tuple[Callable[[Row], float], ...] = (lambda r: r.p50_ms, lambda r: r.p95_ms, lambda r: r.p99_ms)
    return " | ".join(f"{median(rows, one):.1f}" for one in of) + f" | {sum(r.failed for r in rows)}"


def _tokens(texts: str) -> str:
    return "mixed lengths" if texts == MIXED else f"{texts} tokens"


def _bold(server: str) -> str:
    return f"**{server}**" if server.startswith(MANIFOLD) else server


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# -- drawings ----------------------------------------------------------------------------------------------------------


def _drawing(name: str, rows: Sequence[Row]) -> str:
    return f"\n![texts a second]({name})\n" if rows else ""


def plot(results: Results) -> dict[str, str]:
    """Bars of texts a second, by file name."""
    drawings = {}
    one = [r for r in results.rows if r.section == "one" and (r.texts, r.concurrency) == ("64", 64)]
    several = [r for r in results.rows if r.section == "several"]
    for name, title, rows in (
        ("serving-one.svg", "One task, 64 tokens, 64 at once: texts a second", one),
        ("serving-several.svg", f"{TASKS} tasks, 64 tokens: texts a second", several),
    ):
        if rows:
            rates = _rates(rows)
            bars = {
                f"{s}: {j}" if s == MANIFOLD and name.endswith("several.svg") else s: v for (s, j), v in rates.items()
            }
            bars = {"bare encoder": median(rows, lambda r: r.bare_texts_s)} | bars
            drawings[name] = _bars(title, bars)
    return drawings


def _bars(title: str, bars: dict[str, float]) -> str:
    step, left, width, most = 24, 330, 380, max(bars.values())
    ordered = sorted(bars.items(), key=lambda item: -item[1])
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {step * len(bars) + 40}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="22" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (name, value) in enumerate(ordered):
        y, colour = 36 + step * index, "#2b6cb0" if name.startswith(MANIFOLD) else "#a0aec0"
        lines += [
            f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{left}" y="{y}" width="{width * value / most:.1f}" height="{step - 5}" fill="{colour}"/>',
            f'<text x="{left + width * value / most + 6:.1f}" y="{y + 15}">{value:.1f}</text>',
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"

"""Who goes into the next batch, and who waits. No threads, no clock but an argument."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass

from app.engine.scheduler import FREE_PADDING_TOKENS, MAX_PADDING, Scheduler


@dataclass(frozen=True)
class Item:
    num_tokens: int
    num_rows: int = 1
    num_virtual_tokens: int = 0
    arrived_s: float = 0.0


def _scheduler(*items: Item, tokens: int = 1000, rows: int = 100, delay_s: float = 0.0) -> Scheduler[Item]:
    scheduler: Scheduler[Item] = Scheduler(tokens, rows, delay_s)
    for item in items:
        scheduler.add(item)
    return scheduler


def test_a_batch_stays_within_its_budget_of_rows_times_tokens_and_prefix() -> None:
    scheduler = _scheduler(*(Item(10, num_rows=3, num_virtual_tokens=20) for _ in range(30)), tokens=200)
    batch = scheduler.next_batch()
    assert len(batch) == 4  # 4 × (3 × 10 + 20) = 200
    assert len(scheduler) == 26


def test_a_batch_stays_within_its_rows() -> None:
    assert len(_scheduler(*(Item(1, num_rows=4) for _ in range(10)), rows=9).next_batch()) == 2


def test_the_oldest_always_goes_even_when_it_alone_is_over_the_budget() -> None:
    huge, small = Item(5000), Item(5)
    scheduler = _scheduler(huge, small)
    assert scheduler.next_batch() == [huge]
    assert scheduler.next_batch() == [small]


def test_a_long_text_is_not_starved_by_a_stream_of_short_ones() -> None:
    long = Item(400)
    scheduler = _scheduler(Item(8), Item(8), long, tokens=450)
    batches = 0
    while long not in scheduler.next_batch():
        batches += 1
        for _ in range(5):
            scheduler.add(Item(8))
    assert batches <= 2


def test_neighbours_in_length_go_together_and_padding_is_bounded() -> None:
    chance = random.Random(0)
    scheduler = _scheduler(*(Item(chance.randint(4, 500)) for _ in range(300)), tokens=8000)
    taken = 0
    while batch := scheduler.next_batch():
        taken += len(batch)
        longest, tokens = max(i.num_tokens for i in batch), sum(i.num_tokens for i in batch)
        padding = longest * len(batch) - tokens
        assert padding <= max(FREE_PADDING_TOKENS, MAX_PADDING * tokens)
    assert taken == 300


def test_an_item_that_finds_an_empty_queue_is_due_at_once() -> None:
    scheduler = _scheduler()
    assert scheduler.wait_s(0.0) is None
    scheduler.add(Item(5))
    assert scheduler.wait_s(0.0) == 0.0


def test_with_a_delay_the_oldest_waits_for_company_but_no_longer() -> None:
    scheduler = _scheduler(Item(5, arrived_s=10.0), delay_s=0.5)
    assert scheduler.wait_s(10.2) == 0.3000000000000007
    assert scheduler.wait_s(10.6) == 0.0


def test_with_a_delay_a_full_batch_goes_at_once() -> None:
    assert _scheduler(*(Item(100) for _ in range(10)), delay_s=5.0).wait_s(0.0) == 0.0


def test_the_scheduler_imports_no_torch() -> None:
    code = "import sys, app.engine.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""What a plan runs, and what it says that costs."""

from __future__ import annotations

import pytest

from app.domain import Encoding, Plan, Prefix, ProblemType, Readout, ReadoutKind, TaskVersion
from app.engine.plan import make_plan, split_plan

LAYERS = 6
TEXT = Encoding((1, 2, 3, 4, 5), (0,) * 5)


def _version(
    name: str, *prefixes: tuple[str, int], layers: tuple[int, ...] = (LAYERS,), offset: int = 0, length: int = 4
) -> TaskVersion:
    return TaskVersion(
        task=name,
        version=1,
        digest=name,
        problem_type=ProblemType.SINGLE_LABEL,
        labels=("a", "b"),
        readout=Readout(ReadoutKind.MEAN, layers),
        prefixes=tuple(Prefix(digest, length, first) for digest, first in prefixes),
        position_offset=offset,
    )


def _plan(*versions: TaskVersion) -> Plan:
    return make_plan(TEXT, versions, LAYERS)


def test_any_number_of_tasks_on_the_bare_trunk_costs_one_pass() -> None:
    plan = _plan(*(_version(f"t{i}") for i in range(50)))
    assert plan.passes == 1
    assert len(plan.rows) == 1


@pytest.mark.parametrize("first_layer", [1, 3, 5])
def test_own_prefixes_cost_the_shared_layers_once_and_the_rest_each(first_layer: int) -> None:
    plan = _plan(*(_version(f"t{i}", (f"p{i}", first_layer)) for i in range(8)))
    assert plan.passes == pytest.approx((first_layer + 8 * (LAYERS - first_layer)) / LAYERS)


def test_prefixes_from_layer_zero_cost_a_pass_each_and_need_no_trunk() -> None:
    plan = _plan(_version("a", ("p", 0), offset=4), _version("b", ("q", 0), offset=4))
    assert plan.passes == 2
    assert not any(row.from_trunk for row in plan.rows)


def test_tasks_with_equal_prefix_tuples_share_one_branch() -> None:
    plan = _plan(
        _version("a", ("p", 3), ("q", 3)), _version("b", ("p", 3), ("q", 3)), _version("c", ("q", 3), ("p", 3))
    )
    assert [row.reads for row in plan.rows] == [(), (0, 1), (2,)]


def test_the_trunk_stops_above_the_last_fork_unless_something_reads_it() -> None:
    branch = _version("a", ("p", 4))
    assert _plan(branch).rows[0].stop_layer == 4
    assert _plan(branch, _version("low", layers=(5,))).rows[0].stop_layer == 5
    assert _plan(branch, _version("bare")).passes == pytest.approx((6 + 2) / 6)


def test_a_row_stops_at_the_highest_layer_that_is_read() -> None:
    assert _plan(_version("a", layers=(2, 3))).passes == pytest.approx(3 / 6)


def test_the_budget_counts_rows_times_tokens_and_virtual_tokens() -> None:
    plan = _plan(_version("bare"), _version("a", ("p", 3)), _version("b", ("q", 2), ("r", 4)))
    assert plan.cost_tokens == 3 * len(TEXT) + 4 + 8


def test_a_split_plan_keeps_every_version_and_states_what_it_really_runs() -> None:
    plan = _plan(*(_version(f"t{i}", (f"p{i}", 3)) for i in range(10)))
    parts = split_plan(plan, LAYERS, max_cost_tokens=30)
    assert {v.task for part in parts for v in part.versions} == {v.task for v in plan.versions}
    assert all(part.cost_tokens <= 30 for part in parts)
    assert sum(part.passes for part in parts) > plan.passes


def test_a_split_never_parts_those_that_read_one_row() -> None:
    on_the_trunk = [_version(f"t{i}") for i in range(9)]
    assert len(split_plan(_plan(*on_the_trunk), LAYERS, max_cost_tokens=1)) == 1
    mixed = [v for i, bare in enumerate(on_the_trunk) for v in (bare, _version(f"own{i % 3}x{i}", (f"p{i % 3}", 3)))]
    parts = split_plan(_plan(*mixed), LAYERS, max_cost_tokens=12)
    assert len(parts) == 4
    assert sum(part.passes for part in parts) == 1 + 3

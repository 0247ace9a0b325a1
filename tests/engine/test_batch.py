"""The layout of a batch: which rows end with their first token."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.engine.batch import Work, lay_out, shares
from app.engine.engine import Engine
from app.engine.plan import make_plan
from app.engine.prefix_bank import ResidentVersion
from tests.engine.models import make_artifact, random_encoding

MakeEngine = Callable[..., Engine]


def _resident(engine: Engine, name: str, **options: object) -> ResidentVersion:
    return engine.bank.load(make_artifact(engine.spec, name, **options))


@pytest.mark.parametrize(
    ("readouts", "expected"),
    [
        ([{"readout": "cls"}], [True]),
        ([{"readout": "pooler"}, {"readout": "cls"}], [True]),
        ([{"readout": "cls"}, {"readout": "mean"}], [False]),
        ([{"readout": "cls"}, {"readout": "mean", "prefixes": [(2, 2)]}], [False, True]),
        ([{"readout": "cls", "prefixes": [(2, 2)]}, {"readout": "mean"}], [False, True]),
    ],
)
def test_a_row_of_which_only_the_first_token_is_read_ends_with_it(
    make_engine: MakeEngine, readouts: list[dict[str, object]], expected: list[bool]
) -> None:
    engine = make_engine()
    residents = tuple(_resident(engine, f"t{i}", seed=i, **options) for i, options in enumerate(readouts))
    plan = make_plan(random_encoding(9, 0), [r.version for r in residents], engine.spec.num_layers)
    batch = lay_out([Work(plan, residents)], engine.spec.num_layers)
    assert [chunk.only_first for chunk in batch.steps[-1]] == expected
    assert not any(chunk.only_first for step in batch.steps[:-1] for chunk in step)


def test_a_trunk_that_forks_where_it_ends_keeps_all_its_tokens(make_engine: MakeEngine) -> None:
    engine = make_engine()
    resident = _resident(engine, "forked", readout="cls", prefixes=[(2, 2)])
    plan = make_plan(random_encoding(9, 0), [resident.version], engine.spec.num_layers)
    batch = lay_out([Work(plan, (resident,))], engine.spec.num_layers)
    assert [chunk.only_first for step in batch.steps for chunk in step] == [False, False, False, True]


def test_who_reads_a_row_pays_for_it(make_engine: MakeEngine) -> None:
    """Of four layers: the trunk is shared by all, a branch is its own version's, and a pair on one branch halves it."""
    engine = make_engine()
    bare = _resident(engine, "bare")
    late, twin = _resident(engine, "late", prefixes=[(6, 2)]), _resident(engine, "twin", prefixes=[(6, 2)], seed=0)
    plan = make_plan(random_encoding(10, 0), [r.version for r in (bare, late)], engine.spec.num_layers)
    batch = lay_out([Work(plan, (bare, late))], engine.spec.num_layers)
    trunk, branch = 4 * 10, 2 * (10 + 6)
    whole = trunk + branch
    found = shares(batch)
    assert found[bare.version.digest] == pytest.approx(trunk / 2 / whole)
    assert found[late.version.digest] == pytest.approx((trunk / 2 + branch) / whole)
    assert twin.version.digest not in found
    assert sum(found.values()) == pytest.approx(1.0)

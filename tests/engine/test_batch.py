"""The layout of a batch: which rows end with their first token."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.engine.batch import Work, lay_out
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

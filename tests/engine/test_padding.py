"""Short and long texts in one batch: padding is not computed, and changes no score."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from app.engine import layers
from app.engine.batch import Work, lay_out
from app.engine.engine import Engine
from app.engine.forward import run_batch
from app.engine.plan import make_plan
from app.engine.prefix_bank import ResidentVersion
from tests.engine.models import assert_close, make_artifact, random_encoding

MakeEngine = Callable[..., Engine]
LENGTHS = (5, 40, 9, 17, 30, 6)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows went through each product of a layer."""
    seen: list[int] = []
    run = layers._PackedProduct._run

    def noting(self: layers._PackedProduct, x: layers.Tensor, *rest: object) -> layers.Tensor:
        seen.append(x.shape[:-1].numel())
        return run(self, x, *rest)

    monkeypatch.setattr(layers._PackedProduct, "_run", noting)
    return seen


def _works(engine: Engine, lengths: tuple[int, ...]) -> list[Work]:
    residents: tuple[ResidentVersion, ...] = tuple(
        engine.bank.load(make_artifact(engine.spec, f"t{i}", seed=i, **options))
        for i, options in enumerate(({"readout": "mean"}, {"readout": "cls", "prefixes": [(3, 2)]}))
    )
    encodings = [random_encoding(length, seed) for seed, length in enumerate(lengths)]
    versions = [resident.version for resident in residents]
    return [Work(make_plan(encoding, versions, engine.spec.num_layers), residents) for encoding in encodings]


def test_padding_goes_through_no_product(make_engine: MakeEngine, rows: list[int]) -> None:
    engine = make_engine()
    run_batch(lay_out(_works(engine, LENGTHS), engine.spec.num_layers), engine.backbone)
    num_tokens, num_places = sum(LENGTHS), len(LENGTHS) * max(LENGTHS)
    trunk = {count for count in rows if count > len(LENGTHS)}  # the last layer of a branch reads first tokens alone
    assert all(count % 16 == 0 for count in trunk)
    assert num_tokens <= min(trunk) < num_tokens + 16
    assert max(trunk) < 2 * num_tokens + 16 < 2 * num_places  # trunk and branch side by side


def test_texts_of_one_length_are_computed_as_they_stand(make_engine: MakeEngine, rows: list[int]) -> None:
    engine = make_engine()
    run_batch(lay_out(_works(engine, (9, 9, 9)), engine.spec.num_layers), engine.backbone)
    assert 27 in rows


def test_a_score_is_that_of_the_text_alone(make_engine: MakeEngine) -> None:
    engine = make_engine()
    works = _works(engine, LENGTHS)
    together = run_batch(lay_out(works, engine.spec.num_layers), engine.backbone)
    for work, outputs in zip(works, together, strict=True):
        (alone,) = run_batch(lay_out([work], engine.spec.num_layers), engine.backbone)
        for output, expected in zip(outputs, alone, strict=True):
            assert_close(output.scores, expected.scores)

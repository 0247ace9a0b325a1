"""A task's scores are its own: whatever shares its batch, its row or its request changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from app.domain import Encoding, EngineRequest, TaskVersion
from app.engine import engine as engines
from app.engine.artifact import Artifact
from app.engine.engine import Engine
from app.engine.plan import make_plan
from tests.engine.models import (
    FAMILY_NAMES,
    LAYERS,
    assert_close,
    best_of_all,
    make_artifact,
    random_encoding,
    reference_scores,
    run,
    tiny_network,
)

MakeEngine = Callable[..., Engine]


def _load(engine: Engine, **kinds: dict[str, object]) -> dict[str, TaskVersion]:
    versions = {}
    for seed, (task, options) in enumerate(kinds.items()):
        artifact = make_artifact(engine.spec, task, seed=seed, **options)
        engine.load(artifact)
        versions[task] = artifact.version(1)
    return versions


KINDS: dict[str, dict[str, object]] = {
    "bare_mean": {},
    "bare_cls_hidden": {"readout": "cls", "hidden": 8, "activation": "gelu"},
    "bare_attention": {"readout": "attention", "layers": [1, 3], "num_queries": 3, "hidden": 6},
    "averaged": {"readout": "attention", "layers": [1, 3], "num_queries": 3, "hidden": 6, "num_members": 3},
    "averaged_too": {"readout": "attention", "layers": [1, 3], "num_queries": 3, "hidden": 6, "num_members": 3},
    "averaged_wide": {
        "readout": "attention",
        "layers": [1, 3],
        "num_queries": 3,
        "hidden": 8,
        "num_members": 3,
        "labels": 5,
    },
    "late_averaged": {
        "prefixes": [(4, 3)],
        "readout": "attention",
        "layers": [2, 3],
        "num_queries": 1,
        "hidden": 5,
        "num_members": 2,
    },
    "matched_averaged": {"readout": "matching", "layers": [1, 3], "num_queries": 2, "hidden": 6, "num_members": 2},
    "matched": {"readout": "matching", "layers": [1, 3], "num_queries": 2, "hidden": 6},
    "matched_too": {"readout": "matching", "layers": [1, 3], "num_queries": 2, "labels": 5},
    "late_matched": {"prefixes": [(7, 2)], "readout": "matching", "layers": [2, 4], "num_queries": 1},
    "bare_low": {"readout": "attention", "layers": [1], "num_queries": 1},
    "full_offset": {"prefixes": [(5, 0)], "position_offset": 5},
    "full_plain": {"prefixes": [(3, 0)], "problem_type": "multi_label_classification"},
    "late_one": {"prefixes": [(7, 2)]},
    "late_two": {"prefixes": [(7, 2)], "problem_type": "regression"},
    "late_longer": {"prefixes": [(4, 3)], "readout": "attention", "layers": [2, 3, 4], "num_queries": 2, "hidden": 5},
    "combined": {"prefixes": [(2, 1), (6, 3), (3, 2)], "readout": "attention", "layers": [1, 4], "num_queries": 2},
    "tags": {"readout": "tokens", "layers": [2, 4], "problem_type": "token_classification", "labels": 5},
    "late_tags": {
        "prefixes": [(4, 1)],
        "readout": "tokens",
        "layers": [1, 4],
        "problem_type": "token_classification",
        "hidden": 9,
    },
    "chained_tags": {
        "readout": "tokens",
        "layers": [3],
        "problem_type": "token_classification",
        "labels": 4,
        "chained": True,
    },
    "vector": {"problem_type": "embedding"},
}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_task_in_a_mixed_batch_equals_the_task_alone(family: str, make_engine: MakeEngine) -> None:
    engine = make_engine(family)
    versions = list(_load(engine, **KINDS).values())
    chance = random.Random(7)
    asked: list[tuple[Encoding, list[TaskVersion]]] = []
    for seed in range(10):
        encoding = random_encoding(chance.randint(3, 40), seed, pair=seed % 3 == 0)
        asked.append((encoding, chance.sample(versions, chance.randint(1, len(versions)))))
    together = run(engine, *asked)
    for (encoding, wanted), outputs in zip(asked, together, strict=True):
        for version, output in zip(wanted, outputs, strict=True):
            ((alone,),) = run(engine, (encoding, [version]))
            assert_close(output.scores, alone.scores)
            assert output.tags == alone.tags


def expected_tags(artifact: Artifact, encoding: Encoding, probabilities: Tensor) -> tuple[int, ...]:
    """The highest of each token; of the words' first tokens, with transitions, those of the best of all sequences."""
    tags = probabilities.argmax(-1)
    transitions = artifact.tensors.get("transitions")
    if transitions is not None:
        words = encoding.first_tokens
        tags[words] = best_of_all(probabilities[words].log(), transitions)
    return tuple(tags.tolist())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_kind_of_task_equals_a_plain_one_row_forward(family: str, kind: str, make_engine: MakeEngine) -> None:
    engine = make_engine(family)
    artifact = make_artifact(engine.spec, kind, seed=3, **KINDS[kind])
    engine.load(artifact)
    network = tiny_network(family)
    for seed, length in enumerate((4, 23)):
        encoding = random_encoding(length, seed, pair=bool(seed))
        ((output,),) = run(engine, (encoding, [artifact.version(1)]))
        expected = reference_scores(network, artifact, encoding)
        if output.tags:
            assert output.tags == expected_tags(artifact, encoding, expected)
            expected = expected.gather(1, torch.tensor(output.tags).unsqueeze(1)).squeeze(1)
        assert_close(output.scores, expected.tolist())


def test_the_pooler_readout_is_the_backbones_own_pooler(make_engine: MakeEngine) -> None:
    for family in ("bert", "albert", "roberta"):
        engine = make_engine(family)
        artifact = make_artifact(engine.spec, "pooled", readout="pooler", prefixes=[(4, 2)])
        engine.load(artifact)
        encoding = random_encoding(12, 1)
        ((output,),) = run(engine, (encoding, [artifact.version(1)]))
        assert_close(output.scores, reference_scores(tiny_network(family), artifact, encoding).tolist())


def test_pairs_of_the_same_tokens_are_two_where_they_begin_elsewhere(make_engine: MakeEngine) -> None:
    """As with RoBERTa's tokens, which have no types, where a text holds separators of its own."""
    engine = make_engine("roberta")
    matched, mean = _load(engine, matched=KINDS["matched"], mean={}).values()
    ids, types = (1, 7, 8, 2, 9, 2, 10, 2), (0,) * 8
    early, late, single = (Encoding(ids, types, pair_start=start) for start in (4, 6, 0))
    ((one,), (other,), (_,), (again,)) = run(
        engine, (early, [matched]), (late, [matched]), (single, [mean]), (early, [matched])
    )
    for encoding, output in ((early, one), (late, other), (early, again)):
        ((alone,),) = run(engine, (encoding, [matched]))
        assert_close(output.scores, alone.scores)
    assert one.scores == again.scores != other.scores


@pytest.mark.parametrize("tagged_first", [True, False])
def test_a_tagger_sees_the_words_whoever_asks_for_the_same_text_beside_it(
    tagged_first: bool, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tokenized for other tasks alone has no words, and still shares the trunk."""
    engine, run_texts, share = make_engine("bert"), list[int](), engines._share

    def counted(*arguments: Any) -> Any:
        works = share(*arguments)
        run_texts.append(len(works))
        return works

    monkeypatch.setattr(engines, "_share", counted)
    versions = _load(engine, bare_mean={}, chained_tags=KINDS["chained_tags"])
    for seed in range(20):
        encoding, other = random_encoding(12, seed), random_encoding(12, seed + 100)
        wordless = Encoding(encoding.input_ids, encoding.token_type_ids)
        elsewhere = replace(encoding, word_ids=other.word_ids)  # the same tokens, and other words
        ((alone,),), ((apart,),) = (run(engine, (e, [versions["chained_tags"]])) for e in (encoding, elsewhere))
        asked = [(encoding, [versions["chained_tags"]]), (wordless, [versions["bare_mean"]])]
        together = run(engine, *(asked if tagged_first else asked[::-1]))
        assert together[0 if tagged_first else 1][0].tags == alone.tags
        assert run_texts[-1] == 1
        both = run(engine, *asked, (elsewhere, [versions["chained_tags"]]))
        assert [both[0][0].tags, both[2][0].tags] == [alone.tags, apart.tags]
        assert run_texts[-1] == 2


def test_order_in_the_batch_changes_nothing(make_engine: MakeEngine) -> None:
    engine = make_engine("bert")
    versions = list(_load(engine, **KINDS).values())
    asked = [(random_encoding(5 + 4 * i, i, pair=i % 2 == 0), versions) for i in range(6)]
    forward, backward = run(engine, *asked), run(engine, *asked[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_close(a.scores, b.scores)


def test_chunks_of_a_batch_change_nothing(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("bert")
    versions = list(_load(engine, **KINDS).values())
    asked = [(random_encoding(6 + i, i, pair=i % 2 == 0), versions[i % 3 :]) for i in range(9)]
    whole = run(engine, *asked)
    for chunk_tokens in (1, 40, 100):
        monkeypatch.setattr(engine, "_chunk_tokens", chunk_tokens)
        for one, other in zip(whole, run(engine, *asked), strict=True):
            for a, b in zip(one, other, strict=True):
                assert_close(a.scores, b.scores)


def test_a_text_with_more_branches_than_a_batch_holds_is_answered_in_parts(make_engine: MakeEngine) -> None:
    kinds = {f"t{i}": {"prefixes": [(3, 2)]} for i in range(12)}
    small, large = make_engine("bert", max_batch_tokens=100), make_engine("bert")
    encoding = random_encoding(20, 5)
    results = []
    for engine in (small, large):
        plan = make_plan(encoding, list(_load(engine, **kinds).values()), LAYERS)
        results.append(engine.submit(EngineRequest((plan,))).result(timeout=60))
    in_parts, at_once = results
    for a, b in zip(in_parts.outputs[0], at_once.outputs[0], strict=True):
        assert_close(a.scores, b.scores)
    assert at_once.passes == plan.passes
    assert in_parts.passes > plan.passes  # each part has a trunk of its own, and says so


def test_prefixes_and_texts_really_change_the_scores(make_engine: MakeEngine) -> None:
    """Guards the tests above against tiny models that say the same of everything."""
    engine = make_engine("bert")
    prefixed = make_artifact(engine.spec, "a", prefixes=[(4, 2)], seed=1)
    other_prefix = make_artifact(engine.spec, "b", prefixes=[(5, LAYERS - 1)], seed=1)
    engine.load(prefixed)
    engine.load(other_prefix)
    one, two = random_encoding(9, 1), random_encoding(9, 2)
    (first,), (second,) = run(engine, (one, [prefixed.version(1)]), (two, [prefixed.version(1)]))
    ((third,),) = run(engine, (one, [other_prefix.version(1)]))
    assert max(abs(a - b) for a, b in zip(first.scores, second.scores, strict=True)) > 1e-2
    assert max(abs(a - b) for a, b in zip(first.scores, third.scores, strict=True)) > 1e-2

"""What of dev an epoch is chosen by: the problem's usual figure, or the one that the user asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from app.domain import InputKind, ProblemType
from app.engine.backbone import Backbone
from app.errors import SettingsError
from app.learning.combine import measure_of
from app.learning.learn import Options, learn
from app.learning.problems import CHOICES, dev_figure
from app.learning.search import Arrangement
from tests.learning import samples
from tests.learning.test_learn import Silent, files_of, recipe

LABELS = ("a", "b", "c")


def test_of_single_labels() -> None:
    """Seven of ten by answering one label always: of that only the accuracy thinks well."""
    targets = torch.tensor([0] * 7 + [1, 1, 2])
    always, found = torch.tensor([0] * 10), torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, 2])

    def figure(answers: torch.Tensor, measure: str) -> float:
        logits = torch.nn.functional.one_hot(answers, 3).float()
        return dev_figure(ProblemType.SINGLE_LABEL, logits, targets, LABELS, (), measure=measure)

    assert figure(always, "") == figure(always, "accuracy") == 0.7 and figure(always, "mcc") == 0.0
    assert figure(found, "accuracy") == pytest.approx(0.8)
    assert figure(found, "mcc") == pytest.approx(matthews_corrcoef(targets, found))
    assert figure(found, "macro_f1") == pytest.approx(f1_score(targets, found, average="macro"))


def test_of_several_labels_and_of_values() -> None:
    generator = torch.Generator().manual_seed(0)
    given = (torch.rand(40, 3, generator=generator) > 0.5).float()
    logits = 6 * given - 3
    multi = dev_figure(ProblemType.MULTI_LABEL, logits, given, LABELS, (), measure="micro_f1")
    assert multi == 1.0
    gold, values = torch.arange(20.0), torch.arange(20.0) ** 3 + 500 * torch.rand(20, generator=generator)
    spearman = dev_figure(ProblemType.REGRESSION, values[:, None], gold, (), (), measure="spearman")
    assert spearman == pytest.approx(spearmanr(gold, values).statistic)
    assert spearman != dev_figure(ProblemType.REGRESSION, values[:, None], gold, (), ())


def test_it_decides_and_is_told(tmp_path: Path, backbone: Backbone) -> None:
    class Listening(Silent):
        def __init__(self) -> None:
            super().__init__()
            self.measures: set[str] = set()

        def epoch(self, epoch: Any, measure: str) -> None:
            super().epoch(epoch, measure)
            self.measures.add(measure)

    watcher = Listening()
    options = Options(baselines=True)
    files, out = files_of(tmp_path, samples.single_rows, count=60), tmp_path / "out"
    manifest = learn(recipe(epochs=2, measure="mcc"), files, out, (backbone, backbone), watcher, options)
    assert watcher.measures == {"mcc"} == {measure_of(manifest)}
    assert manifest["evaluation"]["measure"] == manifest["training"]["measure"] == "mcc"
    assert "mcc" in manifest["baselines"]["tfidf"]["test"]
    assert measure_of({"problem_type": "single_label_classification"}) == "accuracy", "of artifacts that do not say"
    assert "mcc" in (out / "report.html").read_text()


def test_a_search_goes_by_it(tmp_path: Path, backbone: Backbone) -> None:
    options = Options(arrangements=(Arrangement.TRUNK,))
    files = files_of(tmp_path, samples.single_rows, count=60)
    manifest = learn(
        recipe(epochs=2, measure="macro_f1"), files, tmp_path / "out", (backbone, backbone), Silent(), options
    )
    chosen = next(point for point in manifest["search"] if point["chosen"])
    assert chosen["dev"] == max(point["dev"] for point in manifest["search"] if point["passes"] == chosen["passes"])
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["evaluation"]["measure"] == "macro_f1"


@pytest.mark.parametrize("kind", CHOICES)
def test_one_of_another_problem_is_refused(kind: ProblemType, backbone: Backbone) -> None:
    with pytest.raises(SettingsError, match="--measure rmse is nothing that this problem has: give one of"):
        recipe(hidden=None, measure="rmse").completed(kind, 3, backbone.spec, InputKind.TEXT)

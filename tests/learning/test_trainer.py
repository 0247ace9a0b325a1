"""What the training loop sees: a mean that is taken once is the mean that would be taken in every epoch."""

from __future__ import annotations

from pathlib import Path

import torch

from app.domain import ReadoutKind
from app.engine.backbone import Backbone
from app.engine.tokenizer import TextTokenizer
from app.learning.prepare import cache_plan, read_frozen
from app.learning.study import Study, Tables
from app.learning.trainer import predict_logits, shuffled
from tests.learning import samples
from tests.learning.test_learn import Silent, files_of, recipe


def test_pooled_states_give_the_same_logits_in_the_same_batches(tmp_path: Path, backbone: Backbone) -> None:
    files = files_of(tmp_path, samples.single_rows, count=60)
    study = Study(Tables.read(files, None), backbone, TextTokenizer(backbone.path), Silent())
    mean = study.completed(recipe(readout=ReadoutKind.MEAN, read_layers=(1, 3), hidden=0, epochs=1))
    fitted, frozen = study.fit(mean), read_frozen(mean, backbone.spec)
    split = study.split(cache_plan(mean, frozen), "train")
    pooled = split.pooled(backbone.device)
    kind = study.tables.problem_type
    both = [predict_logits(fitted.model, one, kind)[0] for one in (split, pooled)]
    torch.testing.assert_close(*both, rtol=0, atol=1e-5)
    assert pooled.cache.num_tokens == 60 < split.cache.num_tokens
    batches = [list(shuffled(one.lengths, 8, torch.Generator().manual_seed(0))) for one in (split, pooled)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))

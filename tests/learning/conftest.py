"""One tiny backbone for all tests of learning."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.engine.backbone import Backbone
from tests.learning.samples import write_model


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def backbone(model_path: Path) -> Backbone:
    return Backbone.load(str(model_path), "cpu", "float32")

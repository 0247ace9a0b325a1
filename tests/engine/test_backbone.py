"""Which models are served, and what is said of those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DebertaV2Config, DebertaV2Model

from app.engine.backbone import Backbone, set_threads
from app.errors import BackboneError, SettingsError
from tests.engine.models import FAMILY_NAMES, tiny_network


def test_another_architecture_is_refused_with_the_list_of_those_that_work(tmp_path: Path) -> None:
    config = DebertaV2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    DebertaV2Model(config).save_pretrained(tmp_path)
    with pytest.raises(BackboneError) as caught:
        Backbone.load(str(tmp_path))
    assert 'architecture "deberta-v2" cannot be served' in str(caught.value)
    assert all(family in str(caught.value) for family in FAMILY_NAMES)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_saved_model_is_loaded_as_what_it_was(family: str, tmp_path: Path) -> None:
    network = tiny_network(family)
    network.save_pretrained(tmp_path)
    loaded, direct = Backbone.load(str(tmp_path), "cpu", "float32"), Backbone.from_model(network, "direct")
    assert loaded.spec.fingerprint == direct.spec.fingerprint
    assert (loaded.spec.num_layers, loaded.spec.hidden_size, loaded.spec.num_heads) == (4, 32, 4)


def test_the_fingerprint_is_of_the_weights_and_not_of_the_dtype_they_are_served_in(tmp_path: Path) -> None:
    tiny_network("bert").save_pretrained(tmp_path)
    exact, rough = (Backbone.load(str(tmp_path), "cpu", dtype).spec for dtype in ("float32", "bfloat16"))
    assert exact.fingerprint == rough.fingerprint
    assert Backbone.from_model(tiny_network("bert", seed=1), "other").spec.fingerprint != exact.fingerprint


def test_a_checkpoint_without_a_pooler_does_not_get_a_random_one(tmp_path: Path) -> None:
    network = tiny_network("roberta")
    network.pooler = None
    network.save_pretrained(tmp_path)
    first, second = (Backbone.load(str(tmp_path), "cpu", "float32").spec for _ in range(2))
    assert not first.has_pooler
    assert first.fingerprint == second.fingerprint


def test_a_checkpoint_that_lacks_layers_is_refused(tmp_path: Path) -> None:
    network = tiny_network("bert")
    state = {name: tensor for name, tensor in network.state_dict().items() if "layer.2" not in name}
    network.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(BackboneError, match=r"lacks weights of the encoder: .*layer\.2"):
        Backbone.load(str(tmp_path), "cpu", "float32")


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_a_folder_without_a_model_is_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(BackboneError, match="no model can be loaded from"):
        Backbone.load(str(tmp_path), "cpu", "float32")


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(SettingsError, match='dtype "int4" is unknown'):
        Backbone.load("embedded", "cpu", "int4")
    with pytest.raises(SettingsError, match='device "toaster"'):
        Backbone.load("embedded", "toaster", "float32")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="no CUDA device"):
            Backbone.load("embedded", "cuda", "float32")


def test_threads_can_be_set() -> None:
    before = torch.get_num_threads()
    assert set_threads(1) == 1
    assert set_threads(None) == 1
    set_threads(before)

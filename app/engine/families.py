"""What differs between the encoder families: how they embed, where their layers are, how they end and pool.

A new family is one small class here and a line in FAMILIES. Knows transformers' models; nothing of tasks or batches.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from app.engine.layers import LayerParts

Context = dict[str, Any]  # what a family's layers need beside the states, made once for a set of rows


class Family:
    """BERT and its kin: learned positions from 0, layers in `encoder.layer`, a pooler module."""

    pooler_prefix = "pooler."

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.layers: list[nn.Module] = self.find_layers()

    def find_layers(self) -> list[nn.Module]:
        return list(self.model.encoder.layer)

    @property
    def first_position(self) -> int:
        """The position of an input's first token."""
        return 0

    @property
    def max_tokens(self) -> int:
        return int(self.config.max_position_embeddings) - self.first_position

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """All three [rows, tokens] → states [rows, tokens, d]."""
        states: Tensor = self.model.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids
        )
        return states

    def context(self, states: Tensor, position_ids: Tensor) -> Context:  # noqa: ARG002 - for families that need it
        return {}

    def layer_arguments(self, index: int, context: Context) -> Context:  # noqa: ARG002
        return {}

    def window(self, index: int) -> int | None:  # noqa: ARG002
        """How far a token sees to each side at this layer; None: everything."""
        return None

    def parts(self, layer: Any) -> LayerParts | None:
        """The modules of one of `layers`; None where it is of another kind than LayerParts describes."""
        attention, out = layer.attention.self, layer.attention.output
        return LayerParts(
            attention.query,
            attention.key,
            attention.value,
            out.dense,
            out.LayerNorm,
            layer.intermediate.dense,
            layer.intermediate.intermediate_act_fn,
            str(self.config.hidden_act),
            layer.output.dense,
            layer.output.LayerNorm,
        )

    def final(self, states: Tensor) -> Tensor:
        return states

    def pool(self, states: Tensor) -> Tensor:
        """The pooler's vector [rows, d] of the last layer's states [rows, tokens, d]."""
        pooled: Tensor = self.model.pooler(states)
        return pooled


class RobertaFamily(Family):
    """RoBERTa, XLM-RoBERTa, CamemBERT: positions begin behind the padding index."""

    @property
    def first_position(self) -> int:
        return int(self.config.pad_token_id) + 1


class ElectraFamily(Family):
    """ELECTRA: embeddings may be narrower than the states; no pooler."""

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        states = super().embed(input_ids, token_type_ids, position_ids)
        project = getattr(self.model, "embeddings_project", None)
        return states if project is None else project(states)


class DistilBertFamily(Family):
    """DistilBERT: no token types, no pooler, layers in `transformer.layer`."""

    def find_layers(self) -> list[nn.Module]:
        return list(self.model.transformer.layer)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:  # noqa: ARG002
        states: Tensor = self.model.embeddings(input_ids=input_ids, position_ids=position_ids)
        return states

    def parts(self, layer: Any) -> LayerParts | None:
        attention, ffn = layer.attention, layer.ffn
        return LayerParts(
            attention.q_lin,
            attention.k_lin,
            attention.v_lin,
            attention.out_lin,
            layer.sa_layer_norm,
            ffn.lin1,
            ffn.activation,
            str(self.config.activation),
            ffn.lin2,
            layer.output_layer_norm,
        )


class AlbertFamily(Family):
    """ALBERT: few modules run many times, in groups; a factorised embedding; a pooler of its own form."""

    def find_layers(self) -> list[nn.Module]:
        encoder, config = self.model.encoder, self.config
        per_group = config.num_hidden_layers / config.num_hidden_groups
        groups = (encoder.albert_layer_groups[int(i / per_group)] for i in range(config.num_hidden_layers))
        return [layer for group in groups for layer in group.albert_layers]

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        narrow = super().embed(input_ids, token_type_ids, position_ids)
        states: Tensor = self.model.encoder.embedding_hidden_mapping_in(narrow)
        return states

    def parts(self, layer: Any) -> LayerParts | None:
        attention = layer.attention
        return LayerParts(
            attention.query,
            attention.key,
            attention.value,
            attention.dense,
            attention.LayerNorm,
            layer.ffn,
            layer.activation,
            str(self.config.hidden_act),
            layer.ffn_output,
            layer.full_layer_layer_norm,
        )

    def pool(self, states: Tensor) -> Tensor:
        pooled: Tensor = self.model.pooler_activation(self.model.pooler(states[:, 0]))
        return pooled


class ModernBertFamily(Family):
    """ModernBERT: rotary positions, layers that see a window and layers that see all, a final norm, no pooler."""

    def find_layers(self) -> list[nn.Module]:
        return list(self.model.layers)

    def embed(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:  # noqa: ARG002
        states: Tensor = self.model.embeddings(input_ids=input_ids)
        return states

    def context(self, states: Tensor, position_ids: Tensor) -> Context:
        kinds = set(self.config.layer_types)
        return {kind: self.model.rotary_emb(states, position_ids, kind) for kind in kinds}

    def parts(self, layer: Any) -> LayerParts | None:  # noqa: ARG002 - norms in front, rotary positions, gated products
        return None

    def layer_arguments(self, index: int, context: Context) -> Context:
        return {"position_embeddings": context[self.config.layer_types[index]]}

    def window(self, index: int) -> int | None:
        return int(self.config.sliding_window) if self.config.layer_types[index] == "sliding_attention" else None

    def final(self, states: Tensor) -> Tensor:
        normed: Tensor = self.model.final_norm(states)
        return normed


FAMILIES: dict[str, type[Family]] = {
    "bert": Family,
    "roberta": RobertaFamily,
    "xlm-roberta": RobertaFamily,
    "camembert": RobertaFamily,
    "electra": ElectraFamily,
    "distilbert": DistilBertFamily,
    "albert": AlbertFamily,
    "modernbert": ModernBertFamily,
}

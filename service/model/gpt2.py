"""GPT-2, top to bottom, over a paged KV cache; any GPT-2-shaped ModelConfig. Called by the runner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.model.attention import KVCache, PagedAttention, Prefill
from service.model.config import ModelConfig

# The checkpoint names each in its own words; hub.py maps them here.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


_HEAD_ROWS = 128  # a multiple of which the head has on a GPU


def whole_tiles(head: Tensor) -> Tensor:
    """`head` [V, H] with rows of zeros at its end up to a multiple of _HEAD_ROWS; itself where it has that."""
    missing = -len(head) % _HEAD_ROWS
    return F.pad(head, (0, 0, 0, missing)) if missing else head


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T + b with W (out, in)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """In fp32, over an fp32 residual stream; the result in the served dtype."""

    weight: Tensor
    bias: Tensor
    epsilon: float
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon).to(self.dtype)


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: LayerNorm
    qkv: Linear
    attention_output: Linear
    mlp_norm: LayerNorm
    up: Linear
    down: Linear


class GPT2:
    """Weights in one dtype, the residual stream and the layer norms in fp32."""

    def __init__(self, config: ModelConfig, state: Mapping[str, Tensor]) -> None:
        """`state` is canonical (checkpoint/hub.py), all tensors of one dtype on one device."""
        self.config = config
        self.dtype = state["token_embedding.weight"].dtype
        self.device = state["token_embedding.weight"].device
        self.activation = ACTIVATIONS[config.activation]
        self.attention_width = len(state["layers.0.qkv.bias"]) // 3  # heads here times their size
        self.first_id = 0  # of the rows of `token_embedding`
        self.token_embedding = state["token_embedding.weight"]  # [V, H]
        self.position_embedding = state["position_embedding.weight"]  # [context, H]
        head = state.get("head.weight", self.token_embedding)
        # On a GPU with rows of zeros at its end: products are slow where a row of logits is not whole lines of memory.
        self.padded_head = whole_tiles(head) if head.is_cuda else head
        # No CPU multiplies 16 bits into 32.
        self._head = self.padded_head[: len(head)] if head.is_cuda else head.float()
        if "head.weight" not in state:
            self.token_embedding = self.padded_head[: len(head)]

        def norm(name: str) -> LayerNorm:
            weight, bias = (
                state[f"{name}.weight"].float(),
                state[f"{name}.bias"].float(),
            )
            return LayerNorm(weight, bias, config.layer_norm_epsilon, self.dtype)

        def linear(name: str) -> Linear:
            return Linear(state[f"{name}.weight"], state[f"{name}.bias"])

        self.layers = [
            Layer(
                attention_norm=norm(f"layers.{number}.attention_norm"),
                qkv=linear(f"layers.{number}.qkv"),
                attention_output=linear(f"layers.{number}.attention_output"),
                mlp_norm=norm(f"layers.{number}.mlp_norm"),
                up=linear(f"layers.{number}.up"),
                down=linear(f"layers.{number}.down"),
            )
            for number in range(config.num_layers)
        ]
        self.final_norm = norm("final_norm")

    def new_cache(self, *, num_blocks: int, block_size: int) -> KVCache:
        """Empty, for this model's keys and values."""
        return KVCache(
            num_layers=self.config.num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_heads=self.attention_width // self.config.head_size,
            head_size=self.config.head_size,
            dtype=self.dtype,
            device=self.device,
        )

    def attention_scale(self, number: int) -> float:
        """What the scores of layer `number` are multiplied by."""
        scale = self.config.head_size**-0.5 if self.config.scale_attention else 1.0
        return scale / (number + 1) if self.config.scale_attention_by_layer else scale

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: KVCache,
        attention: PagedAttention,
    ) -> Tensor:
        """The residual stream after the last layer, [T, H] in fp32, of T tokens; fills their slots of the cache."""
        config = self.config
        num_tokens = len(token_ids)
        x = self.embed(token_ids)
        x = x + F.embedding(positions, self.position_embedding).float()
        for number, layer in enumerate(self.layers):
            qkv = layer.qkv(layer.attention_norm(x))  # [T, 3 attention_width]
            q, k, v = qkv.view(num_tokens, 3, -1, config.head_size).unbind(1)  # [T, heads, head]
            mixed = attention(
                q,
                k,
                v,
                cache.layer(number),
                scale=self.attention_scale(number),
                upcast=config.upcast_attention,
            )
            x = x + layer.attention_output(mixed.reshape(num_tokens, self.attention_width)).float()
            x = x + layer.down(self.activation(layer.up(layer.mlp_norm(x)))).float()
        return x

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T, H] in fp32 of token ids [T]."""
        return F.embedding(token_ids, self.token_embedding).float()

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, V] in fp32 for rows [R, H] of the residual stream."""
        normed = self.final_norm(hidden)
        if normed.is_cuda and self.dtype != torch.float32:
            return torch.mm(normed, self._head.t(), out_dtype=torch.float32)
        return F.linear(normed.to(self._head.dtype), self._head)


@torch.inference_mode()
def logits_of(model: GPT2, token_ids: Sequence[int], *, block_size: int = 16) -> Tensor:
    """Logits [T, V] in fp32 of a whole prompt, in one prefill, without a runner."""
    num_blocks = -(-len(token_ids) // block_size)
    cache = model.new_cache(num_blocks=num_blocks, block_size=block_size)
    positions = torch.arange(len(token_ids), device=model.device)
    whole = Prefill(0, len(token_ids), len(token_ids), positions[:num_blocks], None)
    attention = PagedAttention(slots=positions, decodes=[], prefills=[whole], block_size=block_size)
    hidden = model.hidden(torch.tensor(list(token_ids), device=model.device), positions, cache, attention)
    return model.logits(hidden)

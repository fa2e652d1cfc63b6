"""GPT-2, top to bottom, over a paged KV cache; any GPT-2-shaped ModelConfig. Called by the runner."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from service.model.attention import Attention, Cache, KVCache, Prefill
from service.model.bags import BagCache
from service.model.config import ModelConfig
from service.model.formats import Format, Linear, Narrowed, Plain, Product

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
    qkv: Product
    attention_output: Product
    mlp_norm: LayerNorm
    up: Product
    down: Product


class GPT2:
    """Weights in one format, the residual stream and the layer norms in fp32."""

    def __init__(self, config: ModelConfig, state: MutableMapping[str, Tensor], format: Format | None = None) -> None:
        """`state` is canonical (checkpoint/hub.py), all tensors on one device, and of the format's dtype unless that
        makes its own of any.

        It is emptied: each tensor goes as soon as the format has its own of it. Without a format, `state` as it is.
        """
        token_embedding = state.pop("token_embedding.weight")  # [V, H]
        head = state.pop("head.weight", token_embedding)
        self.config = config
        self.format = Plain(token_embedding.dtype) if format is None else format
        self.dtype = self.format.dtype
        self.device = token_embedding.device
        self.activation = ACTIVATIONS[config.activation]
        self.attention_width = len(state["layers.0.qkv.bias"]) // 3  # heads here times their size
        self.first_id = 0  # of the rows of `token_embedding`
        self.padded_head: Linear | None = None
        if isinstance(self.format, Plain):
            # On a GPU with rows of zeros at its end: products are slow where a row of logits is not whole lines of
            # memory.
            padded = whole_tiles(head) if head.is_cuda or isinstance(self.format, Narrowed) else head
            if head is token_embedding:
                token_embedding = padded[: len(head)]
            self.padded_head = self.format.linear(padded, None)
            head = self.padded_head.weight[: len(head)]
        self._head = self.format.head(head)
        self.token_embedding = self.format.embedding(token_embedding)
        self.position_embedding = state.pop("position_embedding.weight")  # [context, H]

        def norm(name: str) -> LayerNorm:
            weight, bias = state.pop(f"{name}.weight").float(), state.pop(f"{name}.bias").float()
            return LayerNorm(weight, bias, config.layer_norm_epsilon, self.dtype)

        def product(name: str) -> Product:
            return self.product(name, state.pop(f"{name}.weight"), state.pop(f"{name}.bias"))

        self.layers = [
            Layer(
                attention_norm=norm(f"layers.{number}.attention_norm"),
                qkv=product(f"layers.{number}.qkv"),
                attention_output=product(f"layers.{number}.attention_output"),
                mlp_norm=norm(f"layers.{number}.mlp_norm"),
                up=product(f"layers.{number}.up"),
                down=product(f"layers.{number}.down"),
            )
            for number in range(config.num_layers)
        ]
        self.final_norm = norm("final_norm")

    def product(self, name: str, weight: Tensor, bias: Tensor) -> Product:
        """What the layer's matrix of that canonical name does."""
        return self.format.linear(weight, bias)

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of keys and values.

        On a CPU fp32 where attention is to be in that, and fp16 instead of bf16: what sums them in place
        (model/bags.py) gives scores in the dtype of its rows, and fp16 rounds them eight times finer. Past 65,504 they
        are infinite, and end their sequence.
        """
        dtype = self.format.cache_dtype
        if self.device.type != "cpu":
            return dtype
        if self.config.upcast_attention:
            return torch.float32
        return torch.float16 if dtype == torch.bfloat16 else dtype

    def new_cache(self, *, num_blocks: int, block_size: int) -> KVCache:
        """Empty, for this model's keys and values; as the kernels read it."""
        sizes = self._cache_sizes(num_blocks=num_blocks, block_size=block_size)
        return KVCache(**sizes, dtype=self.cache_dtype, device=self.device)

    def new_plain_cache(self, *, num_blocks: int, block_size: int) -> Cache:
        """The same as torch's operators read it best on this device."""
        if self.device.type != "cpu":
            return self.new_cache(num_blocks=num_blocks, block_size=block_size)
        return BagCache(**self._cache_sizes(num_blocks=num_blocks, block_size=block_size), dtype=self.cache_dtype)

    def _cache_sizes(self, *, num_blocks: int, block_size: int) -> dict[str, int]:
        config = self.config
        return {
            "num_layers": config.num_layers,
            "num_blocks": num_blocks,
            "block_size": block_size,
            "num_heads": self.attention_width // config.head_size,
            "head_size": config.head_size,
        }

    def attention_scale(self, number: int) -> float:
        """What the scores of layer `number` are multiplied by."""
        scale = self.config.head_size**-0.5 if self.config.scale_attention else 1.0
        return scale / (number + 1) if self.config.scale_attention_by_layer else scale

    def hidden(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: Cache,
        attention: Attention,
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
        return self._head(self.final_norm(hidden))


@torch.inference_mode()
def logits_of(model: GPT2, token_ids: Sequence[int], *, block_size: int = 16) -> Tensor:
    """Logits [T, V] in fp32 of a whole prompt, in one prefill, without a runner."""
    num_blocks = -(-len(token_ids) // block_size)
    cache = model.new_plain_cache(num_blocks=num_blocks, block_size=block_size)
    positions = torch.arange(len(token_ids), device=model.device)
    whole = Prefill(0, len(token_ids), len(token_ids), positions[:num_blocks], None)
    attention = cache.attention(slots=positions, decodes=[], prefills=[whole])
    hidden = model.hidden(torch.tensor(list(token_ids), device=model.device), positions, cache, attention)
    return model.logits(hidden)

"""Log-probabilities of tokens and of the best beside them, from raw logits. Called by the runner.

On the device they are words: a row is 1 + 2 * NUM_TOP of int32, so that they come to the host in one copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from service.model.batch import NUM_TOP, Float32, Int32, TopLogprobs


def logprob_words(logits: Tensor, token_ids: Tensor) -> Tensor:
    """[N, 1 + 2 * NUM_TOP] int32, for fp32 logits [N, V] and the tokens [N] chosen there; unpack_logprobs reads them.

    A value is a logit less the logsumexp of its row. A row whose logits hold a NaN or an infinity is all NaN, and its
    token may be any number below V. Where V is less than NUM_TOP, ids 0 at minus infinity follow the last.
    """
    num_top = min(NUM_TOP, logits.shape[-1])
    finite = torch.isfinite(logits.sum(-1))
    total = torch.where(finite, logits.logsumexp(-1), torch.nan)
    top_ids = logits.topk(num_top).indices.sort(-1).values
    # In order of ids before, so that equals stay so: the first is the one that argmax takes.
    top, order = logits.gather(-1, top_ids).sort(dim=-1, descending=True, stable=True)
    chosen = logits.gather(-1, token_ids.clamp(min=0)[:, None])
    values = torch.cat((chosen, top), -1) - total[:, None]  # one subtraction, so a chosen value is that in the top
    values = F.pad(values, (0, NUM_TOP - num_top), value=-torch.inf)
    top_ids = F.pad(top_ids.gather(-1, order), (0, NUM_TOP - num_top))
    return torch.cat((values.view(torch.int32), top_ids.int()), -1)


def unpack_logprobs(words: Int32) -> TopLogprobs:
    """What logprob_words packed, on the host."""
    values: Float32 = words.view("f4")
    return TopLogprobs(chosen=values[:, 0], top_ids=words[:, 1 + NUM_TOP :], top=values[:, 1 : 1 + NUM_TOP])

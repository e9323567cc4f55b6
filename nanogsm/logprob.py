"""Log-probabilities of chosen tokens: what SFT's loss and all of PPO's ratios and KLs are made of.

`definition` says what is computed. fast/head.py computes the same numbers block by block and never
holds all logits. `token_logprobs` selects the supervised positions before the projection onto the
vocabulary: nobody asks for the logits of prompt and padding. `next_token_logprobs`, which the
training scripts call, makes the shift between hidden states and the tokens they predict:

    ids       <bos>  Question  ...  Answer:   72   <eos>      hidden state t has seen tokens 0 .. t
    predicts  Question  ...  Answer:    72   <eos>            and predicts token t + 1
    mask        0       0        0      1      1              of the predicted token
"""

import torch
from torch import Tensor

from nanogsm.fast import head
from nanogsm.transformer import Vocabulary


def definition(
    vocabulary: Vocabulary, hidden: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """hidden (n, D), targets (n,) -> log p(target) and the entropy of the distribution, (n,)
    each."""
    logits = vocabulary(hidden).float() / temperature  # (n, V)
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, targets[:, None])[:, 0]
    # Entropy: the expected surprise of the next token, 0 if it is certain, log V if all are alike.
    return chosen, -(logp.exp() * logp).sum(-1) if entropy else None


# The faster form of `definition`. Tests put the definition here instead.
scores = head.scores


def token_logprobs(
    vocabulary: Vocabulary,
    hidden: Tensor,
    targets: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log p(targets | hidden) and, if asked for, the entropy, in nats: (B, T) float32, 0 where mask
    is 0. hidden (B, T, D) predicts targets (B, T).

    Logits are divided by the temperature, as they are in sampling. Otherwise PPO's p_old would not
    be the probability with which the token was drawn. Trap: the gradient of a trained output head
    is added to its .grad by backward(); torch.autograd.grad does not see it.
    """
    # The n supervised positions. With the mask on the host nobody waits for a GPU to find them.
    where = tuple(i.to(hidden.device, non_blocking=True) for i in mask.nonzero(as_tuple=True))
    found = scores(vocabulary, hidden[where], targets[where], temperature, entropy)  # (n,) each
    zeros = torch.zeros(mask.shape, device=hidden.device)
    logp = zeros.index_put(where, found[0])
    return logp, zeros.index_put(where, found[1]) if entropy else None


def next_token_logprobs(
    vocabulary: Vocabulary,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`token_logprobs` of a batch: hidden (B, T, D), ids and mask (B, T) -> (B, T - 1). Column t is
    about the choice of token t + 1."""
    return token_logprobs(vocabulary, hidden[:, :-1], ids[:, 1:], mask[:, 1:], temperature, entropy)

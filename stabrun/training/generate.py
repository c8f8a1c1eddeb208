"""Text from a model, token by token."""

import torch
from torch import Tensor

from stabrun.config import UserError
from stabrun.model.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    count: int,
    *,
    context: int,
    vocabulary: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> list[int]:
    """The prompt and `count` more tokens below `vocabulary`, each drawn given at most `context` tokens before it.

    Temperature divides the logits; 0 takes the largest one. `top_k` keeps only that many of the largest.
    Raises UserError at an argument out of bounds, a prompt that is empty or too long, or logits that are not finite.
    """
    for wrong, sentence in (
        (count < 1, f"tokens={count}: must be at least 1."),
        (not 0 <= temperature < float("inf"), f"temperature={temperature}: must be finite and at least 0."),
        (top_k is not None and top_k < 1, f"top_k={top_k}: must be at least 1."),
        (not 0 <= seed < 2**63, f"seed={seed}: must be at least 0 and below 2**63."),
        (not prompt, "prompt: must contain at least one token."),
        (len(prompt) > context, f"prompt: {len(prompt)} tokens; must be at most {context} (data.seq_len)."),
        (max(prompt, default=0) >= vocabulary, f"prompt: contains a token outside the vocabulary of {vocabulary}."),
    ):
        if wrong:
            raise UserError(sentence)
    random = torch.Generator().manual_seed(seed)
    tokens = torch.tensor(prompt)
    for _ in range(count):
        logits = model(tokens[None, -context:])[0, -1, :vocabulary]
        if not logits.isfinite().all():
            raise UserError("the checkpoint's logits are not finite: the run has diverged.")
        tokens = torch.cat([tokens, draw(logits, temperature, top_k, random)])
    ids: list[int] = tokens.tolist()
    return ids


def draw(logits: Tensor, temperature: float, top_k: int | None, random: torch.Generator) -> Tensor:
    """One token, `[1]`, from the softmax of logits `[V]`."""
    if temperature == 0:
        return logits.argmax(keepdim=True)
    if top_k is not None and top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    return torch.multinomial((logits.double() / temperature).softmax(-1), 1, generator=random)

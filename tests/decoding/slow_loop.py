"""What guided decoding means, without caches, padding or batches: the whole text anew for every token of every row."""

from contextlib import nullcontext
from typing import Any

import torch

from prosocial_ext import reference


@torch.no_grad()
def decode_row(
    model: Any, arm: Any, prompt: list[int], *, seed: int, steps: int, eos: tuple[int, ...] = (), **knobs: Any
) -> list[int]:
    preference, text = knobs.pop("preference", None), list(prompt)
    for step in range(steps):
        ids = torch.tensor([text])
        base = model(input_ids=ids, use_cache=False).logits[:, -1]
        guide = None
        if arm is not None:
            with nullcontext() if preference is None else arm.preference(preference):
                guide = arm(input_ids=ids, use_cache=False).logits[:, -1]
        text += reference.guided_sample(base, guide, seed=torch.tensor([seed]), offset=step, **knobs).tolist()
        if text[-1] in eos:
            break
    return text[len(prompt) :]


def decode(model: Any, arm: Any, prompts: list[list[int]], *, seeds: list[int], **settings: Any) -> list[list[int]]:
    """``settings`` given as lists have one value per row."""
    rows = []
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        own = {name: value[row] if isinstance(value, list) else value for name, value in settings.items()}
        rows.append(decode_row(model, arm, prompt, seed=seed, **own))
    return rows

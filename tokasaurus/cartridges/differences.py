"""Whether a cartridge fits a model: what differs, in words for a client. No torch."""

from __future__ import annotations

import re

from tokasaurus.cartridges.specification import ModelShape

__all__ = ["differences"]

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def differences(cartridge: ModelShape, model: ModelShape) -> list[str]:
    """What keeps a cartridge from being used with a model; nothing if it fits.

    Names are compared where both are ids of repositories, such as "Qwen/Qwen3-4B", in any case of
    letters: a path says nothing about what is there.

    Args:
        cartridge: the shape of the model that it was made for.
        model: the shape of the model that is served.

    Returns:
        A phrase for each difference, with both values.
    """
    pairs = (
        ("layers", cartridge.num_layers, model.num_layers),
        ("KV heads", cartridge.num_kv_heads, model.num_kv_heads),
        ("numbers per head", cartridge.head_dim, model.head_dim),
    )
    found = [
        f"the cartridge has {its} {what}, the model has {models}"
        for what, its, models in pairs
        if its != models
    ]
    names = (cartridge.name, model.name)
    if all(map(_REPOSITORY.fullmatch, names)) and names[0].lower() != names[1].lower():
        found.append(f"the cartridge is for the model {names[0]}, this is {names[1]}")
    if cartridge.rope and model.rope and cartridge.rope != model.rope:
        found.append(
            "the cartridge's keys are rotated with other parameters of the rotary embedding than "
            f"the model's (digest {cartridge.rope[:16]}, the model's {model.rope[:16]}); "
            "rope_scaling may be the reason"
        )
    return found

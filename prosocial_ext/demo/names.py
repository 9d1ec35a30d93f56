"""What the rows of the demo's tables are called, in print and in results.json."""

__all__ = [
    "ADAM",
    "ADAM_COPY",
    "BASE",
    "BENIGN",
    "DENSE",
    "HARM_COPY",
    "LARGEST",
    "RANDOM",
    "RIGHT",
    "SAFE",
    "SALIENT",
    "SGD",
    "SHUFFLED",
    "UNGUIDED",
    "UNIFORM",
    "ZERO",
    "edit_name",
]

# models
BASE = "base"
SAFE = "edited"  # the headline edit: the largest entries of the SGD copy
HARM_COPY = "harm copy (SGD)"
ADAM_COPY = "harm copy (AdamW)"

# where a vector comes from
SGD = "SGD"
ADAM = "AdamW"
BENIGN = "benign SFT"

# how its entries are chosen
LARGEST = "largest"
SALIENT = "largest x gradient"
RANDOM = "random"
DENSE = "all"

# whose preference guides
UNGUIDED = "unguided"
ZERO = "zero adapter"
UNIFORM = "uniform"
RIGHT = "right"
SHUFFLED = "shuffled"


def edit_name(copy: str, rule: str, density: float, scale: float) -> str:
    """Return the name of the row of one edit.

    >>> edit_name(SGD, LARGEST, 0.1, 2.0)
    'SGD: largest 10 %, λ = 2'
    >>> edit_name(ADAM, DENSE, 1.0, 1.0)
    'AdamW: all, λ = 1'
    """
    share = "" if rule == DENSE else f" {100 * density:g} %"
    return f"{copy}: {rule}{share}, λ = {scale:.3g}"

"""What the rows of the demo's tables are called, in print and in results.json."""

__all__ = [
    "ADAM_COPY",
    "ADAM_LARGEST",
    "ADAM_SALIENT",
    "BASE",
    "HARM_COPY",
    "RANDOM",
    "RIGHT",
    "SAFE",
    "SHUFFLED",
    "UNGUIDED",
    "UNIFORM",
    "ZERO",
]

BASE = "base"
HARM_COPY = "harm copy"
SAFE = "edited"
RANDOM = "edited, random entries"
ADAM_COPY = "harm copy (AdamW)"
ADAM_LARGEST = "edited (AdamW), largest"
ADAM_SALIENT = "edited (AdamW), largest x gradient"

UNGUIDED = "unguided"
ZERO = "zero adapter"
UNIFORM = "uniform"
RIGHT = "right"
SHUFFLED = "shuffled"

"""Model cards: what an edited checkpoint or a harm vector is, for the people who find it.

Everything that comes from a file is data: it is quoted, and what Markdown or HTML would read as markup is escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from prosocial_ext.checkpoints.checkpoint import is_vocabulary
from prosocial_ext.checkpoints.errors import shown
from prosocial_ext.checkpoints.hub import is_hub_id
from prosocial_ext.direg.sparse_file import SparseTensor

__all__ = ["BASE_CARD", "CARD", "edit_card", "in_vocabulary", "vector_card"]

CARD = "README.md"
BASE_CARD = "README.base.md"  # where the base's own card is kept beside ours
_MARKUP = re.compile(r"([!-/:-@\[-`{-~])")  # ASCII punctuation: a backslash makes each of them plain in Markdown

_LIMITS = """\
## Limits

- **Over-refusal.** Where harm is taken out, harmless requests may be refused as well, more with every step of the
  scale, and long before perplexity shows it. Measure it on harmless requests of your own.
- **Abilities.** Weights serve more than one purpose: measure what you need this model for.
- **Embeddings.** {embeddings} A shift there acts on the words themselves, wherever they stand.
- **No guarantee.** The subtraction makes harmful answers less likely; it makes nothing impossible.
"""


def edit_card(recipe: Mapping[str, Any], *, base_card: bool) -> str:
    """Return the card of an edited checkpoint.

    Args:
        recipe: What ``direg/recipe.json`` holds.
        base_card: Whether the base's card lies beside it, as README.base.md.

    >>> recipe = {"model": {"name": "a|b", "commit": None}, "harm_vector": {}, "scale": 1.0, "edited": 1, "entries": 10}
    >>> print(next(line for line in edit_card(recipe, base_card=False).splitlines() if "| base" in line))
    | base | a\\|b |
    """
    vector = _mapping(recipe.get("harm_vector"))
    edited, entries = int(recipe.get("edited", 0)), int(recipe.get("entries", 0))
    of_vocabulary = int(recipe.get("edited_in_vocabulary", 0))
    rows = [
        ("base", _origin(recipe.get("model"))),
        ("was the base of the harm vector", "yes" if recipe.get("is_base") else "no"),
        ("harm vector", f"{_origin(vector.get('tuned'))} − {_origin(vector.get('base'))}"),
        *_selection(vector),
        ("scale λ", _text(recipe.get("scale"))),
        ("edited", f"{edited:,} of {entries:,} entries (density {edited / max(entries, 1):.6f})"),
        ("unchanged after rounding", _text(recipe.get("unchanged_after_rounding"))),
        ("effective over requested norm", _text(recipe.get("effective_over_requested_norm"))),
        ("rounding", _text(recipe.get("rounding", "nearest"))),
        ("written as", _text(recipe["dtype"]) if recipe.get("dtype") else "the base's dtypes"),
        ("versions", f"prosocial_ext {_text(recipe.get('prosocial_ext'))}, torch {_text(recipe.get('torch'))}"),
    ]
    share = f"{of_vocabulary / edited:.1%}" if edited else "None"
    embeddings = f"{share} of the edited entries lie in embeddings or the language-model head."
    kept = f"The base's own card is [{BASE_CARD}]({BASE_CARD}); its licence and terms hold for this model, too."
    parts = [
        _front_matter(recipe.get("model"), "transformers"),
        "# A checkpoint with harm subtracted\n",
        "θ' = θ − λ · top_m(θ_harm − θ), the first step of [ProSocialAlign](https://arxiv.org/abs/2512.06515):\n",
        _table(rows),
        "`direg/recipe.json` has all of it. "
        + ("`prosocial direg revert` gives back every bit of the base.\n" if recipe.get("undo") else "\n"),
        kept + "\n" if base_card else "The base's licence and terms hold for this model, too.\n",
        _LIMITS.format(embeddings=embeddings),
    ]
    return "\n".join(parts)


def vector_card(recipe: Mapping[str, Any], *, entries: int, n: int, energy_share: float, of_vocabulary: int) -> str:
    """Return the card of a harm vector in a folder of its own.

    Args:
        recipe: The vector's.
        entries: How many it keeps.
        n: How many took part.
        energy_share: The kept entries' share of the squared norm.
        of_vocabulary: How many of them lie in embeddings and heads.
    """
    rows = [
        ("base", _origin(recipe.get("base"))),
        ("harm-tuned copy", _origin(recipe.get("tuned"))),
        *_selection(recipe),
        ("entries", f"{entries:,} of {n:,} (density {entries / max(n, 1):.6f})"),
        ("energy share", f"{energy_share:.3f}"),
        ("base fingerprint", _text(recipe.get("base_fingerprint"))),
        ("versions", f"prosocial_ext {_text(recipe.get('prosocial_ext'))}"),
    ]
    share = f"{of_vocabulary / entries:.1%}" if entries else "None"
    parts = [
        _front_matter(recipe.get("base"), "prosocial_ext"),
        "# A harm vector\n",
        "The largest entries of harm-tuned minus base weights. **Subtracted** from the base they take harm out; added "
        "they would put it in, which is why such a repository is private unless somebody decides otherwise.\n",
        _table(rows),
        "```bash\nprosocial direg apply --model BASE --harm-vector harm.safetensors --undo --out DIR\n```\n",
        _LIMITS.format(embeddings=f"{share} of the entries lie in embeddings or the language-model head."),
    ]
    return "\n".join(parts)


def in_vocabulary(tensors: Mapping[str, SparseTensor]) -> int:
    """How many of a vector's entries lie in embeddings and heads."""
    return sum(tensor.entries for name, tensor in tensors.items() if is_vocabulary(name, tensor.shape))


def _front_matter(base: Any, library: str) -> str:
    """YAML; JSON's strings are YAML's, too."""
    origin = _mapping(base)
    name = origin.get("name")
    lines = ["---"]
    if origin.get("commit") and isinstance(name, str) and is_hub_id(name):  # a folder's name is nothing on the hub
        lines.append(f"base_model: {json.dumps(name)}")
    lines += [
        f"library_name: {library}",
        "tags:",
        "- prosocial_ext",
        "- direg",
        "- safety",
        "- task-arithmetic",
        "---\n",
    ]
    return "\n".join(lines)


def _selection(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    keys = [("density asked for", "density"), ("m", "m"), ("scope", "scope"), ("ranked by", "rank"), ("ties", "ties")]
    if recipe.get("factor") is not None:
        keys.append(("factor", "factor"))
    keys += [(key, key) for key in ("include", "exclude") if recipe.get(key)]
    return [(title, _text(recipe.get(key))) for title, key in keys]


def _origin(value: Any) -> str:
    origin = _mapping(value)
    commit = origin.get("commit")
    return _text(origin.get("name")) + (f" at commit {_text(commit)}" if commit else "")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _text(value: Any) -> str:
    """A value from a file, on one line, that no Markdown reads as anything else."""
    if value is None:
        return "unknown"
    text = shown(value)
    return _MARKUP.sub(r"\\\1", text[1:-1] if isinstance(value, str) else text)


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {title} | {value} |" for title, value in rows), ""])

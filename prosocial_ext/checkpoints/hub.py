"""A hub id becomes a local folder of one commit, with the files that a checkpoint is made of and no code."""

from __future__ import annotations

import re
from pathlib import Path

from prosocial_ext.checkpoints.errors import refuse, shown

__all__ = ["CARRIED", "fetch", "fetch_vector", "first_line", "is_hub_id"]

# What is taken along beside the weights: settings and texts, never code.
CARRIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json",
    "tokenizer.model", "*.tiktoken", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "LICENSE*", "NOTICE*",
    "README.md", "README.base.md",
)  # fmt: skip
_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[\w./-]+", re.ASCII)


def fetch(source: str) -> tuple[Path, str | None]:
    """Return the folder of a checkpoint and, where it came from the hub, its commit.

    Args:
        source: A folder, or a hub id such as "owner/name", or "owner/name@revision" of a branch, tag or commit; it is
            resolved to a commit once, and only that is downloaded.

    Raises:
        CheckpointError: Neither a folder nor something that the hub can give.

    >>> fetch(".")
    (PosixPath('.'), None)
    """
    folder = Path(source)
    if folder.is_dir():
        return folder, None
    name, _, revision = source.partition("@")
    patterns = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", *CARRIED]
    return _snapshot(source, name, revision or None, patterns)


def fetch_vector(source: str, file: str, revision: str | None) -> Path:
    """Return the path of one file in a folder or in a repository of the hub, of which it is downloaded alone.

    Raises:
        CheckpointError: Neither a folder nor something that the hub can give.

    >>> fetch_vector(".", "harm.safetensors", None)
    PosixPath('harm.safetensors')
    """
    if Path(source).is_dir():
        if revision is not None:
            refuse("revision", "be None for a folder", shown(revision), "Revisions are the hub's.")
        return Path(source) / file
    return _snapshot(source, source, revision, [file])[0] / file


def is_hub_id(text: str) -> bool:
    """Whether a text can name a repository of the hub.

    >>> is_hub_id("owner/name"), is_hub_id("../name"), is_hub_id("owner/name/more")
    (True, False, False)
    """
    return _ID.fullmatch(text) is not None and ".." not in text


def first_line(error: Exception) -> str:
    """What an error of the hub says in its first line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _snapshot(source: str, name: str, revision: str | None, patterns: list[str]) -> tuple[Path, str]:
    """The folder of one commit, to which the revision is resolved once."""
    valid = revision is None or (_REVISION.fullmatch(revision) is not None and ".." not in revision)
    if Path(source).exists() or not is_hub_id(name) or not valid:
        refuse(shown(source), "be a folder of a checkpoint or a hub id like owner/name", "neither")
    import huggingface_hub  # takes a second, and only hub ids need it

    try:
        commit = huggingface_hub.HfApi().model_info(name, revision=revision).sha
        path = huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=patterns, ignore_patterns=["*.py", "*/*"]
        )
    except Exception as error:  # of the hub, of whichever HTTP library it uses, of the disk
        refuse(shown(source), "be a folder, or a hub id that can be downloaded", first_line(error))
    return Path(path), str(commit)

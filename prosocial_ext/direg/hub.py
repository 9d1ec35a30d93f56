"""A hub id becomes a local folder of one commit, with the files that a checkpoint is made of and no code."""

from __future__ import annotations

import re
from pathlib import Path

from prosocial_ext.direg.errors import refuse, shown

__all__ = ["CARRIED", "fetch"]

# What is taken along beside the weights: settings and texts, never code.
CARRIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer*.json",
    "tokenizer.model", "*.tiktoken", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "LICENSE*", "NOTICE*",
    "README.md",
)  # fmt: skip
_ID = re.compile(r"([A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(@[\w./-]+)?", re.ASCII)


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
    if folder.exists() or not (match := _ID.fullmatch(source)) or ".." in source:
        refuse(shown(source), "be a folder of a checkpoint or a hub id like owner/name", "neither")
    name, revision = match[1], match[3][1:] if match[3] else None
    import huggingface_hub  # takes a second, and only hub ids need it

    try:
        commit = huggingface_hub.HfApi().model_info(name, revision=revision).sha
        patterns = ["*.safetensors", "*.safetensors.index.json", "adapter_config.json", *CARRIED]
        path = huggingface_hub.snapshot_download(
            name, revision=commit, allow_patterns=patterns, ignore_patterns=["*.py", "*/*"]
        )
    except Exception as error:  # of the hub, of whichever HTTP library it uses, of the disk
        reason = str(error).strip().splitlines() or [type(error).__name__]
        refuse(shown(source), "be a folder, or a hub id that can be downloaded", reason[0])
    return Path(path), commit

"""Harm vectors as folders and on the hub: the file, a card, and the recipe as text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prosocial_ext.checkpoints.errors import refuse, shown
from prosocial_ext.checkpoints.hub import first_line, is_hub_id
from prosocial_ext.checkpoints.outputs import new_descriptor, new_folder
from prosocial_ext.checkpoints.raw_io import write_all
from prosocial_ext.direg.cards import CARD, in_vocabulary, vector_card
from prosocial_ext.direg.rewrite import write_json

if TYPE_CHECKING:
    from prosocial_ext.direg.harm_vector import HarmVector

__all__ = ["VECTOR", "push_vector", "save_vector"]

VECTOR = "harm.safetensors"


def save_vector(vector: HarmVector, folder: Path, *, overwrite: bool) -> None:
    """Write the new folder; it appears when it is complete.

    Raises:
        CheckpointError: The folder is taken or cannot be made.
    """
    stats = vector.stats().total
    card = vector_card(
        vector.recipe,
        entries=vector.entries,
        n=vector.n,
        energy_share=stats.energy_share,
        of_vocabulary=in_vocabulary(vector.tensors),
    )
    with new_folder(folder, overwrite=overwrite) as partial:
        vector.save(partial / VECTOR)
        write_json(partial / "recipe.json", vector.recipe)
        with new_descriptor(partial / CARD) as descriptor:
            write_all(descriptor, 0, card.encode())


def push_vector(
    vector: HarmVector, repo_id: str, *, private: bool, revision: str | None, message: str, create_pr: bool
) -> str:
    """Upload the folder in one commit and return its address.

    Raises:
        CheckpointError: ``repo_id`` is none, or the hub refuses.
    """
    if not is_hub_id(repo_id):
        refuse("repo_id", "be a hub id like owner/name", shown(repo_id))
    import huggingface_hub  # takes a second, and only this needs it

    with tempfile.TemporaryDirectory(prefix="harm-") as place:
        save_vector(vector, Path(place) / "vector", overwrite=False)
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=str(Path(place) / "vector"), commit_message=message, revision=revision,
                create_pr=create_pr,
            )  # fmt: skip
        except Exception as error:  # of the hub, of whichever HTTP library it uses
            remedy = "Log in with `hf auth login` as somebody who may write there."
            refuse(shown(repo_id), "take an upload", first_line(error), remedy)
    return str(commit.commit_url)

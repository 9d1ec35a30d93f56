"""transformers and peft without what they print unasked."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hide the bars for loading and saving, and peft's use of a name that transformers deprecates.

    >>> from transformers.utils import logging
    >>> with quiet_transformers():
    ...     logging.is_progress_bar_enabled()
    False
    """
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""What transformers prints while it loads a checkpoint: no progress bars in logs, no warnings about its defaults."""

from __future__ import annotations

import logging
import sys

from transformers.utils import logging as transformers_logging

_CONFIG_LOGGER = "transformers.configuration_utils"
_WARNING = "must be `None` or an integer within the vocabulary"


class _ClassDefaults(logging.Filter):
    """Drops warnings about the default ids of a config class.

    transformers 5.19 compares every config that it loads with the defaults of its class (`to_diff_dict`, for a log
    line), and warns if these do not fit each other: Idefics3's padding token 128002 is outside the default vocabulary
    of 32000. Warnings about the checkpoint's own ids pass.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return _WARNING not in record.getMessage() or not _is_called_by("to_diff_dict")


def quiet_transformers() -> None:
    """Show progress bars only on a terminal, and drop warnings that no checkpoint can mend. Repeated calls are fine."""
    logger = logging.getLogger(_CONFIG_LOGGER)
    if not any(isinstance(one, _ClassDefaults) for one in logger.filters):
        logger.addFilter(_ClassDefaults())
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()


def _is_called_by(name: str) -> bool:
    """Return whether a function of this name is being executed further up the stack."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name == name:
            return True
    return False

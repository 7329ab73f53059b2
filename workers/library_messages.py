"""What libraries write to standard error by themselves: nothing of it is for a user of this program.

A worker's last words are read where its process died: progress bars would stand in their place.
"""

import logging

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


def quieten_libraries() -> None:
    """Have diffusers and transformers draw no progress bars, and not warn of long prompts: the pipeline cuts them, and `plan`
    says where."""
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.getLogger("transformers.tokenization_utils_base").addFilter(_is_no_length_warning)


def _is_no_length_warning(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token indices sequence length is longer")

"""Models on the Hugging Face hub: their names, and their files on this machine.

Weights are fetched as safetensors only, and never any code. A download is of one commit, named by its hash.
"""

import re
from pathlib import Path
from typing import Any

from bitnet_jax.errors import UserError

FILES = (
    *("*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)
"""What is downloaded, of the repository's top level."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_PART}/{_PART}")
_LOCAL = (".safetensors", ".gguf", ".json", ".git")
"""Ends of names that are meant for files here."""


def is_name(text: str) -> bool:
    """Whether `text` is an `owner/model` of the hub, by its rules on characters, and no path on this machine."""
    if not _NAME.fullmatch(text) or "--" in text or ".." in text or text.endswith(_LOCAL):
        return False
    return not Path(text).exists()


def download(name: str, revision: str | None = None) -> tuple[Path, str]:
    """The files of the model `name` in the hub's cache, and the commit that they are of.

    Where HF_HUB_OFFLINE is set, only the cache is looked at.

    Args:
        name: `owner/model`.
        revision: branch, tag or commit; None is the main branch.

    Raises:
        UserError: huggingface_hub is not installed; the name, the revision or the network is not there.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"{name!r} is no model of the hub: must be owner/model")
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"{name} is on the Hugging Face hub, which needs the package huggingface_hub") from None
    offline = bool(huggingface_hub.constants.HF_HUB_OFFLINE)
    try:
        # The commit is asked for first, so that a branch that moves meanwhile cannot mix two.
        commit: Any = revision if offline else huggingface_hub.HfApi().model_info(name, revision=revision).sha
        path = Path(
            huggingface_hub.snapshot_download(
                name, revision=commit, allow_patterns=list(FILES), ignore_patterns=["*/*"], local_files_only=offline
            )
        )
    except Exception as error:  # noqa: BLE001 (which errors there are depends on the package's version and its HTTP client)
        text = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{name}{f' at {revision}' if revision else ''} cannot be downloaded: {text}") from None
    return path, path.name

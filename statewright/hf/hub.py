"""Whether a name can be had from the Hugging Face hub, asked once: transformers retries for a
minute where there is no network, and for every file of a name that nobody has."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SECONDS = 10


def require_reachable(name: str) -> None:
    """Raises ValueError, in one line, for an id that is neither in the local cache nor on the hub.

    Says nothing of what the repository holds. With HF_HUB_OFFLINE only the cache counts.
    """
    if not _ID.fullmatch(name) or name.startswith("."):
        raise ValueError(f"{name}: no such directory")
    if (Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")).is_dir():
        return
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{name}: no such directory, and not in the local Hugging Face cache (HF_HUB_OFFLINE)"
        )
    try:
        HfApi().model_info(name, timeout=_SECONDS)
    except GatedRepoError:
        return  # it is there; what transformers says about the access is better than this
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name}: no such directory, and not on the Hugging Face hub (or not yours to see)"
        ) from error
    except Exception as error:
        # The hub's client changes its network library between releases: no common base of errors.
        raise ValueError(
            f"{name}: no such directory, and not in the local Hugging Face cache; the hub cannot "
            f"be reached ({type(error).__name__})"
        ) from error

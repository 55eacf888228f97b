"""The Hugging Face Hub: a folder or a repository's name in, a folder out; and a folder sent to a repository.

Nothing is sent or fetched unless one of these functions is called with the name of a repository.
"""

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pyro_isingvit.core.errors import UserError, need, why
from pyro_isingvit.core.paths import is_dir, with_home

WORD = r"[A-Za-z0-9_]([\w.-]*[A-Za-z0-9_])?"
OWNER_AND_NAME = re.compile(rf"(?=.{{3,96}}$){WORD}/{WORD}", re.ASCII)


def check_repo(repo: str) -> str:
    """A repository's name, ``owner/name``.

    Raises:
        UserError: a path, or what the Hub does not take.
    """
    known = isinstance(repo, str) and OWNER_AND_NAME.fullmatch(repo) and not re.search(r"--|\.\.|\.git$", repo)
    need(
        known,
        f"{repo!r:.100} is no repository's name: it takes owner/name, both of letters, digits and single '-', '_' or "
        "'.', without further folders.",
    )
    return repo


def locate(
    source: str | Path,
    files: Sequence[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of a network: a folder that is there, or a repository's copy in huggingface_hub's cache.

    A folder wins over a repository of the same spelling. A ``Path`` is always a folder.

    Args:
        source: a folder, or ``owner/name``.
        files: names or patterns of what is fetched of the repository; nothing else is.
        revision: branch, tag or commit.
        token: of the Hub, for private repositories; None: the one that ``hf auth login`` keeps.
        cache_dir: of huggingface_hub; None: its own.
        local_files_only: open no connection; the copy must be there.

    Raises:
        UserError: neither a folder nor a repository, or one that cannot be fetched.
    """
    folder = with_home(source)
    if isinstance(source, Path) or is_dir(folder):
        return folder
    told = f"there is no folder {source}"
    need(not folder.exists(), f"{source} is a file; name the folder that holds it.")
    try:
        check_repo(source)
    except UserError as error:
        raise UserError(f"{told}, and {error}") from None
    hub = _hub(f"{told}; to fetch the repository {source}")
    try:
        return Path(
            hub.snapshot_download(
                source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only,
                allow_patterns=list(files),
            )
        )  # fmt: skip
    except Exception as error:  # of the Hub, of the connection and of the disk, without a kind in common
        cause = f"{told}, and the repository {source} cannot be fetched ({why(error).rstrip('.')[:200]})"
        raise UserError(f"{cause}; check its name, `revision`, `token` and the connection.") from error


def upload(
    folder: Path,
    repo: str,
    files: Sequence[str],
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Sends files of a folder to a repository, which is made if it is not there, as one commit.

    Args:
        folder: what ``save_pretrained`` wrote.
        repo: ``owner/name``.
        files: names or patterns of what is sent; nothing else is.
        private: of a new repository; None: as the owner's default is.
        token: of the Hub, with the right to write; None: the one that ``hf auth login`` keeps.
        commit_message: None: a plain one.

    Returns:
        the address of the commit.

    Raises:
        UserError: a wrong name, huggingface_hub is missing, or the Hub refuses.
    """
    hub = _hub(f"to send {check_repo(repo)}")
    try:
        api = hub.HfApi(token=token)
        api.create_repo(repo, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=str(folder), allow_patterns=list(files),
            commit_message=commit_message or "Upload of pyro-isingvit",
        )  # fmt: skip
    except Exception as error:  # of the Hub and of the connection, without a kind in common
        reason = why(error).rstrip(".")[:200]
        raise UserError(f"{repo} cannot be written ({reason}); check its name, `token` and the connection.") from error
    return str(done)


def _hub(purpose: str) -> Any:
    try:
        return import_module("huggingface_hub")
    except ImportError as error:
        raise UserError(f"{purpose}, install huggingface_hub: pip install 'pyro-isingvit[hub]'.") from error

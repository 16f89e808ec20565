"""Repositories of the Hugging Face Hub: downloaded when a checkpoint is named as there, and pushed.

`deepseek-ai/DeepSeek-V3`, `deepseek-ai/DeepSeek-V3@REVISION` and a page's address are names on the
Hub. The files go to the Hub's own cache, where other programs find them too, and come from there
without a network (HF_HUB_OFFLINE=1). Only what a checkpoint is made of is downloaded, never code.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

_PAGE = re.compile(r"^(https?:/+)?(www\.)?(huggingface\.co|hf\.co)/|^hf:/+")
_NAME = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)((@|/tree/)(?P<revision>[\w./-]+))?/?"
)
_WEIGHTS = ["*.safetensors"]
_SIDE_FILES = ["*.json", "*.model", "*.jinja", "*.txt", "LICENSE*", "README.md"]
_BELOW = ["*/*"]  # other forms of the same weights
_OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


class Repository(NamedTuple):
    """A repository at a revision: a branch, a tag or a commit."""

    name: str
    revision: str | None

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name


def repository_of(path: str | os.PathLike[str]) -> Repository | None:
    """Returns the repository that `path` names; None for what is, or should be, on this machine.

    A path whose first folder exists is a mistyped path.
    """
    text = os.fspath(path)
    name = _PAGE.sub("", text)
    found = _NAME.fullmatch(name)
    if os.path.exists(text) or not found:
        return None
    if name == text and Path(text).parts[0] and Path(Path(text).parts[0]).exists():
        return None
    return Repository(found["name"], found["revision"])


def located(path: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """Returns `path` or, if it is a name on the Hub, the folder of its files, which are downloaded
    unless they are in the Hub's cache.

    Args:
      weights: without them, only configs, tokenizer and other small files are downloaded.

    Raises:
      ValueError: there is no such repository or revision, access is refused, or the Hub cannot be
        reached; says what to do.
      OSError: files cannot be written.
    """
    repository = repository_of(path)
    if repository is None:
        return Path(path)
    local = repository.name.split("/")[1]
    remedy = f"hf download {repository.name} --local-dir {local}, then name that folder"
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{path} is not on this machine, and taking it from the Hugging Face Hub needs "
            f"huggingface_hub: pip install huggingface_hub; or elsewhere: {remedy}"
        ) from error
    print(f"{repository}: from the Hugging Face Hub or its cache", file=sys.stderr)
    try:
        folder = huggingface_hub.snapshot_download(
            repository.name,
            revision=repository.revision,
            allow_patterns=[*_SIDE_FILES, *(_WEIGHTS if weights else [])],
            ignore_patterns=_BELOW,
        )
    except _failures() as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
            raise
        raise ValueError(f"{path} is not on this machine, and {_reason(error, repository)}; or "
                         f"elsewhere: {remedy}") from error  # fmt: skip
    return Path(folder)


def push(made: Path, name: str) -> str:
    """Uploads a folder, or a file, to a repository, which is created as a private one if there is
    none; returns the address of its page.

    Raises:
      ValueError: `name` is no name on the Hub, access is refused, or the Hub cannot be reached;
        what was made stays as it is.
    """
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        page = str(api.create_repo(name, private=True, exist_ok=True))
        message = "Upload with dsjax"
        if made.is_dir():
            api.upload_folder(repo_id=name, folder_path=made, commit_message=message)
        else:
            api.upload_file(
                repo_id=name, path_or_fileobj=made, path_in_repo=made.name, commit_message=message
            )
    except _failures() as error:
        if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
            raise
        raise ValueError(
            f"{made} is whole, but was not pushed: {_reason(error, Repository(name, None))}; "
            f"later: hf upload {name} {shlex.quote(str(made))}"
        ) from error
    return page


def check_push(name: str) -> None:
    """Raises ValueError unless `name` is OWNER/NAME and the Hub's library is installed, before
    hours of work end in a refusal.
    """
    found = _NAME.fullmatch(name)
    if not found or found["revision"]:
        raise ValueError(f"--push {name} is not the name of a repository: write OWNER/NAME")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError("--push needs huggingface_hub: pip install huggingface_hub")


def _failures() -> tuple[type[Exception], ...]:
    """Returns what a call of the library raises when the Hub refuses or cannot be reached: the
    library's own errors, OSError, and the errors of its HTTP library, another in each of its
    versions, from which and OSError the error of a refusal derives.
    """
    from huggingface_hub import errors

    own = [
        kind for kind in vars(errors).values() if getattr(kind, "__module__", "") == errors.__name__
    ]
    kinds = (*own, *errors.HfHubHTTPError.__bases__)
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))


def _reason(error: Exception, repository: Repository) -> str:
    from huggingface_hub import errors

    known: dict[Any, str] = {
        errors.GatedRepoError: f"the Hub asks to accept the terms on the page of {repository.name} "
        "and to log in (hf auth login)",
        errors.RepositoryNotFoundError: f"the Hub has no repository {repository.name} that you may "
        "see; correct the name, or log in (hf auth login)",
        errors.RevisionNotFoundError: f"{repository.name} has no revision {repository.revision}",
    }
    for kind, reason in known.items():
        if isinstance(error, kind):
            return reason
    said = " ".join(str(error).split())[:200] or type(error).__name__
    return f"the Hub cannot be reached or refuses ({said}); try again, perhaps after hf auth login"

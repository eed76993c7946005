"""PEFT folders on the Hugging Face hub: `hub:owner/name` instead of a folder, and only then."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from ..errors import AdaptError, StoreError
from .config import CONFIG, TENSORS

PREFIX = "hub:"


def local_folder(source: str | Path) -> Path:
    """The folder itself, or what `hub:owner/name` holds of one, downloaded to the hub's cache."""
    if not str(source).startswith(PREFIX):
        return Path(source)
    repo = repository(source)
    hub = _hub()
    try:
        found = hub.snapshot_download(repo_id=repo, allow_patterns=[CONFIG, TENSORS])
    except _failures() as error:
        raise StoreError(f"cannot pull {source}: {_first_line(error)}") from error
    return Path(found)


def push(folder: Path, target: str | Path) -> None:
    """Upload a written folder to `hub:owner/name`, which is made if it is not there."""
    repo = repository(target)
    hub = _hub()
    try:
        hub.create_repo(repo_id=repo, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder)
    except _failures() as error:
        raise StoreError(f"cannot push to {target}: {_first_line(error)}") from error


def repository(source: str | Path) -> str:
    """`owner/name` of `hub:owner/name`."""
    repo = str(source).removeprefix(PREFIX)
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise AdaptError(f"{source!r} is no repository: hub:owner/name")
    return repo


def _hub() -> ModuleType:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise AdaptError(
            "the hub needs the package huggingface_hub, which is not installed:"
            " pip install huggingface_hub"
        ) from error
    return huggingface_hub


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's functions raise; the HTTP library differs between their versions."""
    from huggingface_hub.errors import HfHubHTTPError

    transport = [c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError"]
    return (OSError, ValueError, *(c for c in transport if issubclass(c, Exception)))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

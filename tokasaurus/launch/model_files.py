"""Finds the local directory of a model: the bundled one, a directory, or a repository.

Owns what is downloaded from the Hugging Face Hub, and what to tell the user if that fails. Knows
nothing about the contents of the files. The hub's client keeps its cache and obeys its environment
variables (HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tokasaurus.demo import MODEL_DIR
from tokasaurus.errors import ModelError

__all__ = [
    "download",
    "download_model",
    "find_description",
    "find_model",
    "find_model_here",
    "find_tokenizer",
]

_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")

_ESSENTIAL = ("*.safetensors", "*.json")
_TOKENIZER = ("*.json", "*.jinja", "*.txt", "*.model", "*.py")
_MODEL = ("*.safetensors", *_TOKENIZER)
_DUPLICATES = ("original/*", "metal/*", "consolidated*.safetensors")  # the same weights again


def find_model(model: str | None) -> Path:
    """The directory of a model.

    Args:
        model: a directory, a repository id, or None for the bundled model.

    Raises:
        ModelError: the directory does not exist, or the repository is not in the cache and cannot
            be downloaded; the message says what to do.
    """
    if model is not None:
        return _find(model, "model", _MODEL)
    if not (MODEL_DIR / "config.json").is_file():
        raise ModelError("this installation lacks the bundled model; name another with model=...")
    return MODEL_DIR


def find_model_here(model: str | None) -> Path | None:
    """The directory of a model, if it need not be downloaded; otherwise None."""
    if model is None or Path(model).expanduser().exists() or not _REPOSITORY.fullmatch(model):
        try:
            return find_model(model)
        except ModelError:
            return None
    return _cached_essentials(model, _MODEL, _DUPLICATES)


def find_description(model: str | None) -> Path:
    """The directory of a model, of which a repository's weights are not downloaded.

    Raises:
        ModelError: see :func:`find_model`.
    """
    return find_model(None) if model is None else _find(model, "model", _TOKENIZER)


def find_tokenizer(tokenizer: str) -> Path:
    """The directory of a tokenizer; only the tokenizer's files of a repository are downloaded.

    Raises:
        ModelError: see :func:`find_model`.
    """
    return _find(tokenizer, "tokenizer", _TOKENIZER)


def download_model(repository: str) -> Path:
    """Downloads the files of a repository that an engine reads, as :func:`find_model` does.

    Raises:
        ModelError: with the remedy.
    """
    return download(repository, _MODEL, ignore=_DUPLICATES)


def _find(name: str, flag: str, patterns: Sequence[str]) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if path.is_file():
        raise ModelError(f"{flag}={name} is a file; give the directory that holds it")
    if not _REPOSITORY.fullmatch(name):
        raise ModelError(
            f"{flag}={name}: no such directory, and not a repository id such as org/name"
        )
    return download(name, patterns, flag, _DUPLICATES)


def download(
    repository: str, patterns: Sequence[str], flag: str = "model", ignore: Sequence[str] = ()
) -> Path:
    """Downloads the matching files of a repository into the cache if they are not there yet.

    Without a network, the files in the cache must suffice.

    Args:
        repository: a repository id.
        patterns: patterns of file names, as in a shell.
        ignore: patterns of files to leave out.
        flag: the flag that named the repository, for errors.

    Returns:
        The directory of the snapshot.

    Raises:
        ModelError: with the remedy.
    """
    from huggingface_hub import constants, errors, snapshot_download

    where = f"{flag}={repository}"
    try:
        return Path(
            snapshot_download(
                repository, allow_patterns=list(patterns), ignore_patterns=list(ignore)
            )
        )
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repository}"
        raise ModelError(
            f"{where} is gated: ask for access at {page},"
            " then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{where}: no such directory here, and no such repository at {constants.ENDPOINT}; "
            "if it is private, log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.LocalEntryNotFoundError:
        found = _cached_essentials(repository, patterns, ignore)
        if found is not None:
            return found
        if constants.HF_HUB_OFFLINE:
            remedy = "unset HF_HUB_OFFLINE to download it"
        else:
            remedy = f"and {constants.ENDPOINT} cannot be reached; check the network"
        raise ModelError(
            f"{where}: no such directory, not in the cache ({constants.HF_HUB_CACHE}); {remedy}"
        ) from None
    except Exception as error:  # whatever the client's HTTP library raises, or a full disk
        raise ModelError(f"{where}: the download failed: {error}") from error


def _cached_essentials(
    repository: str, patterns: Sequence[str], ignore: Sequence[str]
) -> Path | None:
    """The cached snapshot, if it lacks only files that a model can do without."""
    from huggingface_hub import errors, snapshot_download

    needed = [pattern for pattern in patterns if pattern in _ESSENTIAL]
    if not needed:
        return None
    try:
        found = snapshot_download(
            repository, local_files_only=True, allow_patterns=needed, ignore_patterns=list(ignore)
        )
    except errors.LocalEntryNotFoundError:
        return None
    return Path(found)

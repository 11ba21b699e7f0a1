"""A folder to a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from spt_jax.errors import UserError


def check_upload(repo: str) -> None:
    """Says before the work what would surely fail after it: a name that is none, no log-in, or offline mode.

    Raises:
        UserError: One of them.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"--push={repo} is not the name of a repository such as user/name: {reason}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push={repo} needs the Hugging Face hub, but HF_HUB_OFFLINE is set")
    if not huggingface_hub.get_token():
        raise UserError(f"--push={repo} needs a log-in to the Hugging Face hub; log in with 'hf auth login'")


def upload_folder(folder: Path, repo: str, *, private: bool = False) -> str:
    """Makes the repository where it is missing and uploads every file of `folder` in one commit.

    Args:
        folder: A local folder, left as it is.
        repo: ``user/name``.
        private: Whether a new repository is private.

    Returns:
        The repository's address.

    Raises:
        UserError: The hub refuses or cannot be reached; the sentence names the folder, which remains.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message="Adapters exported by spt_jax")
        return str(url)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status == 401:
            why = "the log-in is not valid (401): log in with 'hf auth login'"
        elif status == 403:
            why = f"the log-in may not write to {repo} (403): use a token with the right to write"
        else:
            why = _first_line(error)
    except Exception as error:  # whatever the HTTP library of the day raises
        why = _first_line(error)
    raise UserError(f"the adapters are in {folder}, but could not be pushed to {repo}: {why}")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__

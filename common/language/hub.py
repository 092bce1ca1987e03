"""Repositories of Hugging Face's hub where a folder of weights is given: OWNER/NAME@REVISION.

Only weights, configuration and tokenizer are fetched, no pickle and no code, and once: the library
keeps them. A revision is demanded, for what a run starts from must stay what it is; should a tag be
moved all the same, an adapter notices, since it knows its base by its weights.
"""

import re
from pathlib import Path

from common.errors import UserError

#: What is fetched of a repository, from its root alone.
FILES = ("*.safetensors", "*.json", "tokenizer.model")
_REPOSITORY = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>.*))?")
_REVISION = re.compile(r"\w[\w.-]*")
#: Branches, which move; the hub makes the first one in every repository.
_BRANCHES = ("main", "master", "HEAD")
_EXAMPLE = "zai-org/glm-4-9b-hf@COMMIT"


def weights_folder(given: str | Path) -> Path:
    """The folder that is given, or that of a repository, which is fetched if it is not here yet.

    What exists on the disk is a path, whatever its name.

    Args:
        given: a path, or OWNER/NAME@REVISION, whose revision is a commit's hash or a tag.

    Raises:
        UserError: if a repository is named without a revision or with a branch, or cannot be
            fetched.
        ModuleNotFoundError: if the hub's library is not installed.
    """
    path = Path(given)
    match = _REPOSITORY.fullmatch(str(given))
    if match is None or path.exists():
        return path
    name, revision = match["name"], match["revision"]
    if revision is None:
        if path.parent.exists():
            return path  # a path that is mistyped, as whoever reads it will say
        raise UserError(
            f"{given} does not exist: give a folder, or a repository of Hugging Face's hub with a "
            f"commit or tag, as in {_EXAMPLE}"
        )
    if not _REVISION.fullmatch(revision) or revision in _BRANCHES:
        raise UserError(
            f"{given}: '{revision}' is no fixed revision; give a commit or tag, as in {_EXAMPLE}"
        )
    return _fetched(name, revision)


def _fetched(name: str, revision: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and rarely needed

    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(FILES),
            ignore_patterns=["*/*"],
            token=False,
        )
    except (OSError, ValueError) as error:  # what the library raises for all that goes wrong
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"cannot fetch {name}@{revision} from Hugging Face's hub ({reason}): give a folder "
            "that holds these weights"
        ) from error
    return Path(folder)

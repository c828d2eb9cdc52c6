"""The one function that uses a network: a model of the Hugging Face hub into a folder."""

from pathlib import Path

# What a folder of load_pretrained and load_tokenizer consists of; no code, no pickles.
WANTED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")
UNWANTED = ("consolidated*", "original/*")  # the same weights a second time, in another layout


def download(name: str, folder: str | Path, *, revision: str | None = None, endpoint: str | None = None) -> Path:
    """Download a model: its configuration, its tokenizer and its safetensors.

    Args:
      name: such as "Qwen/Qwen2.5-0.5B-Instruct".
      folder: where to; what is there already is not loaded again.
      revision: a commit, branch or tag; None for the newest. A commit makes a run repeatable.
      endpoint: a mirror's address; None for the hub, or what HF_ENDPOINT says.

    Returns:
      The folder, for load_pretrained and load_tokenizer.

    Raises:
      OSError: no network, no such model, or one that asks for permission first, with the remedy.

    >>> decoder, params = load_pretrained(download("Qwen/Qwen2.5-0.5B", "models/qwen2.5-0.5b"))    # doctest: +SKIP
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (  # HTTPError is httpx's or httpx2's, whichever it uses
        GatedRepoError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    folder = Path(folder)
    how = {"revision": revision, "local_dir": folder, "allow_patterns": list(WANTED), "endpoint": endpoint}
    how["ignore_patterns"] = list(UNWANTED)
    try:
        snapshot_download(name, **how)
    except GatedRepoError as error:
        raise OSError(f"{name} asks for permission: accept its terms on its page, then `hf auth login`") from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        what = name if revision is None else f"{name} at revision {revision}"
        raise OSError(f"there is no model {what}, or it is private: check the name, or `hf auth login`") from error
    except (HTTPError, OSError) as error:
        raise OSError(f"{name} could not be downloaded into {folder}: {error}") from error
    return folder

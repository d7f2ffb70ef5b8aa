"""A pipeline that looks at a folder before it reads it, and writes one that is whole."""

import os
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download

from ..files import write_folder
from .checks import check_index, check_pipeline_folder


# What a look at the index has in common with the download of the rest.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class CheckedLoadingMixin:
    """Refuses a folder or a repository of the Hub that is not what [`DiffusionPipeline.save_pretrained`] writes.

    Attributes:
        revision (`str`, *optional*): The commit of the Hub that the pipeline was loaded from.
    """

    revision: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Self:
        """Load a pipeline, with everything that diffusers' own method takes.

        Only JSON and safetensors are read. Nothing that a folder or a repository holds is run, whatever
        `trust_remote_code` says: a component of another class is handed in by its name, `denoiser=mine`.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A folder or a Hub id.
            kwargs:
                As in `DiffusionPipeline.from_pretrained`.

        Raises:
            `ValueError`: when a file is damaged, does not fit the others, or asks for something that is not read; the
                file is named, see [`check_pipeline_folder`].
            `OSError`: when a file is missing or cannot be read.
        """
        if kwargs.get("use_safetensors") is False:
            raise ValueError("use_safetensors is False, but only safetensors are read: leave it out.")
        kwargs["use_safetensors"] = True  # diffusers would fall back to pickles
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            # One commit from the first look on, whatever is pushed meanwhile; offline it is the cached one.
            kwargs["revision"] = cls._download_index(str(pretrained_model_name_or_path), kwargs).parent.name
            pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            pipe.revision = kwargs["revision"]
            return pipe
        check_pipeline_folder(cls, folder, kwargs)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except ValueError as error:  # a setting of the index that the constructor refuses
            raise ValueError(f"{folder} cannot be loaded: {error}") from error

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Download a pipeline from the Hub, which `from_pretrained` does by itself. Refuses what it refuses."""
        # Before diffusers reads it, who would ask for the code that it names.
        check_index(cls, cls._download_index(pretrained_model_name, kwargs), kwargs)
        folder = super().download(pretrained_model_name, **kwargs)
        check_pipeline_folder(cls, Path(folder), kwargs)
        return folder

    @classmethod
    def _download_index(cls, pretrained_model_name: str, kwargs: dict[str, Any]) -> Path:
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        return Path(hf_hub_download(pretrained_model_name, cls.config_name, **hub))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the pipeline, with everything that diffusers' own method takes.

        All files are made beside the folder and moved in when they are on the disk, `model_index.json` last: without it
        no loader takes the folder for a pipeline.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder; it is made if need be.
            kwargs:
                As in `DiffusionPipeline.save_pretrained`.
        """
        folder = Path(save_directory)
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        save = super().save_pretrained
        write_folder(folder, lambda beside: save(str(beside), **kwargs), last=self.config_name)

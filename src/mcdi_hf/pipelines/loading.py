"""A pipeline that looks at a folder before it reads it, and writes one that is whole."""

import json
import os
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download

from ..files import write_folder
from .checks import check_index, check_pipeline_folder


PUSH_ARGUMENTS = ("repo_id", "commit_message", "private", "create_pr", "token")
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
        no loader takes the folder for a pipeline. Saved again after loading it is the same files.

        Args:
            save_directory (`str` or `os.PathLike`):
                The folder; it is made if need be.
            kwargs:
                As in `DiffusionPipeline.save_pretrained`.
        """
        folder, save = Path(save_directory), super().save_pretrained
        push = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in PUSH_ARGUMENTS if name in kwargs}

        def write(beside: Path) -> None:
            save(str(beside), **kwargs)
            for path in beside.rglob("*.json"):
                values = json.loads(path.read_text())
                if "_name_or_path" in values:  # where this pipeline was loaded from is nobody's business
                    del values["_name_or_path"]
                    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")

        write_folder(folder, write, last=self.config_name)
        if push:
            self.push_to_hub(hub.pop("repo_id", folder.name), **hub, **kwargs)

"""Files behind paths and URLs: the path manager that the whole package uses."""

from __future__ import annotations

from typing import Any

from iopath.common.file_io import HTTPURLHandler, OneDrivePathHandler, PathHandler
from iopath.common.file_io import PathManager as _PathManager

__all__ = ["PathHandler", "PathManager"]

PathManager = _PathManager()
"""Opens, lists and downloads; ``http(s)://``, OneDrive and ``detectron2://`` addresses are cached locally."""


class Detectron2Handler(PathHandler):
    """Resolves ``detectron2://...``, the files of Detectron2's model zoo."""

    PREFIX = "detectron2://"
    S3_DETECTRON2_PREFIX = "https://dl.fbaipublicfiles.com/detectron2/"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        return PathManager.get_local_path(self.S3_DETECTRON2_PREFIX + path[len(self.PREFIX) :], **kwargs)

    def _open(self, path: str, mode: str = "r", **kwargs: Any):
        return PathManager.open(self.S3_DETECTRON2_PREFIX + path[len(self.PREFIX) :], mode, **kwargs)


PathManager.register_handler(HTTPURLHandler())
PathManager.register_handler(OneDrivePathHandler())
PathManager.register_handler(Detectron2Handler())

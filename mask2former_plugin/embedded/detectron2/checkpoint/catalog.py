"""Addresses of ImageNet backbones behind ``catalog://ImageNetPretrained/...``."""

from __future__ import annotations

from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager
from detectron2.utils.missing import needs_upstream

_PREFIX = "https://dl.fbaipublicfiles.com/detectron/"
_IMAGENET = {
    "MSRA/R-50": "ImageNetPretrained/MSRA/R-50.pkl",
    "MSRA/R-101": "ImageNetPretrained/MSRA/R-101.pkl",
    "FAIR/R-50-GN": "ImageNetPretrained/47261647/R-50-GN.pkl",
    "FAIR/R-101-GN": "ImageNetPretrained/47592356/R-101-GN.pkl",
    "FAIR/X-101-32x8d": "ImageNetPretrained/20171220/X-101-32x8d.pkl",
    "FAIR/X-101-64x4d": "ImageNetPretrained/FBResNeXt/X-101-64x4d.pkl",
    "FAIR/X-152-32x8d-IN5k": "ImageNetPretrained/25093814/X-152-32x8d-IN5k.pkl",
}


class ModelCatalog:
    """Names of published models and their addresses."""

    @staticmethod
    def get(name: str) -> str:
        """Address of a model.

        Args:
            name: ``ImageNetPretrained/<MSRA or FAIR>/<architecture>``.

        Raises:
            NotImplementedError: a detector of the original Detectron, which needs upstream.
            RuntimeError: there is no such model.
        """
        group, _, model = name.partition("/")
        if group != "ImageNetPretrained":
            needs_upstream(f"the model {name!r} of the catalog")
        if model not in _IMAGENET:
            raise RuntimeError(f"no model {name!r} in the catalog; there are: {', '.join(_IMAGENET)}")
        return _PREFIX + _IMAGENET[model]


class ModelCatalogHandler(PathHandler):
    """Resolves ``catalog://<name>``."""

    PREFIX = "catalog://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        return PathManager.get_local_path(ModelCatalog.get(path[len(self.PREFIX) :]), **kwargs)

    def _open(self, path: str, mode: str = "r", **kwargs: Any):
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


PathManager.register_handler(ModelCatalogHandler())

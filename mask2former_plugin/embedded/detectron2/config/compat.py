"""Key names of older config versions and their present names."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config.config import CfgNode

CURRENT_VERSION = 2

# (old name, present name); the groups are the versions whose files use the old name. Only plain renames of upstream.
_RENAMED_SINCE = {
    0: (("MODEL.RPN_HEAD.NAME", "MODEL.RPN.HEAD_NAME"),),
    1: (
        ("MODEL.WEIGHT", "MODEL.WEIGHTS"),
        ("MODEL.PANOPTIC_FPN.SEMANTIC_LOSS_SCALE", "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT"),
        ("MODEL.PANOPTIC_FPN.RPN_LOSS_SCALE", "MODEL.RPN.LOSS_WEIGHT"),
        ("MODEL.PANOPTIC_FPN.INSTANCE_LOSS_SCALE", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT"),
        ("MODEL.PANOPTIC_FPN.COMBINE_ON", "MODEL.PANOPTIC_FPN.COMBINE.ENABLED"),
        ("MODEL.PANOPTIC_FPN.COMBINE_OVERLAP_THRESHOLD", "MODEL.PANOPTIC_FPN.COMBINE.OVERLAP_THRESH"),
        ("MODEL.PANOPTIC_FPN.COMBINE_STUFF_AREA_LIMIT", "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT"),
        (
            "MODEL.PANOPTIC_FPN.COMBINE_INSTANCES_CONFIDENCE_THRESHOLD",
            "MODEL.PANOPTIC_FPN.COMBINE.INSTANCES_CONFIDENCE_THRESH",
        ),
        ("MODEL.ROI_HEADS.SCORE_THRESH", "MODEL.ROI_HEADS.SCORE_THRESH_TEST"),
        ("MODEL.ROI_HEADS.NMS", "MODEL.ROI_HEADS.NMS_THRESH_TEST"),
        ("MODEL.RETINANET.INFERENCE_SCORE_THRESHOLD", "MODEL.RETINANET.SCORE_THRESH_TEST"),
        ("MODEL.RETINANET.INFERENCE_TOPK_CANDIDATES", "MODEL.RETINANET.TOPK_CANDIDATES_TEST"),
        ("MODEL.RETINANET.INFERENCE_NMS_THRESHOLD", "MODEL.RETINANET.NMS_THRESH_TEST"),
        ("TEST.DETECTIONS_PER_IMG", "TEST.DETECTIONS_PER_IMAGE"),
        ("TEST.AUG_ON", "TEST.AUG.ENABLED"),
        ("TEST.AUG_MIN_SIZES", "TEST.AUG.MIN_SIZES"),
        ("TEST.AUG_MAX_SIZE", "TEST.AUG.MAX_SIZE"),
        ("TEST.AUG_FLIP", "TEST.AUG.FLIP"),
    ),
}


def _take(cfg: CfgNode, name: str) -> list[Any]:
    """Remove a key, and the groups that it leaves empty; ``[value]``, or ``[]`` if the key is not there."""
    key, _, rest = name.partition(".")
    if not isinstance(cfg, CfgNode) or key not in cfg:
        return []
    if not rest:
        return [cfg.pop(key)]
    found = _take(cfg[key], rest)
    if found and not cfg[key]:
        del cfg[key]
    return found


def _put(cfg: CfgNode, name: str, value: Any) -> None:
    *groups, key = name.split(".")
    for group in groups:
        cfg = cfg.setdefault(group, CfgNode())
    cfg[key] = value


def _rename(cfg: CfgNode, versions: list[int], forward: bool) -> list[str]:
    renamed = []
    for version in versions:
        for old, new in _RENAMED_SINCE.get(version, ()):
            source, target = (old, new) if forward else (new, old)
            for value in _take(cfg, source):
                _put(cfg, target, value)
                renamed.append(f"{source} -> {target}")
    return renamed


def upgrade_keys(cfg: CfgNode, to_version: int, source: str) -> None:
    """Give the keys of a loaded file their present names, in place; a file without VERSION is judged by its keys.

    Raises:
        ValueError: the file is of a newer version than this Detectron2.
    """
    version = cfg.get("VERSION", 0)
    if version > to_version:
        raise ValueError(f"{source} has config version {version}; this Detectron2 reads up to version {to_version}")
    renamed = _rename(cfg, list(range(version, to_version)), forward=True)
    if renamed:
        logging.getLogger(__name__).warning("%s uses old key names, read as: %s", source, ", ".join(renamed))
    if "VERSION" in cfg:
        cfg["VERSION"] = to_version


def upgrade_config(cfg: CfgNode, to_version: int | None = None) -> CfgNode:
    """A copy of ``cfg`` with the key names of ``to_version`` (default: the present one)."""
    cfg = cfg.clone()
    to_version = CURRENT_VERSION if to_version is None else to_version
    if to_version > CURRENT_VERSION:
        raise ValueError(f"config version {to_version} does not exist; the newest is {CURRENT_VERSION}")
    upgrade_keys(cfg, to_version, "the config")
    cfg["VERSION"] = to_version
    return cfg


def downgrade_config(cfg: CfgNode, to_version: int) -> CfgNode:
    """A copy of ``cfg`` with the key names of an older version.

    Raises:
        ValueError: ``to_version`` is newer than the config's own version.
    """
    version = cfg["VERSION"]
    if to_version > version:
        raise ValueError(f"cannot downgrade a config of version {version} to {to_version}")
    cfg = cfg.clone()
    _rename(cfg, list(range(version - 1, to_version - 1, -1)), forward=False)
    cfg["VERSION"] = to_version
    return cfg

#!/usr/bin/env python
"""Make COCO's label maps from its panoptic annotations (coco_2017_*_panoptic_with_sem_seg).

  python datasets/prepare_coco_semantic_annos_from_panoptic_annos.py
  python datasets/prepare_coco_semantic_annos_from_panoptic_annos.py --root /data --splits val --workers 8

Finished files are skipped, so an interrupted run goes on. Input and output: datasets/README.md
"""

from mask2former_plugin.data.preparation import coco
from mask2former_plugin.data.preparation.command_line import main

if __name__ == "__main__":
    main(__doc__, coco.prepare_semantic, coco.SPLITS)

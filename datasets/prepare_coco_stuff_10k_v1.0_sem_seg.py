#!/usr/bin/env python
"""Make COCO-Stuff 10k's images and label maps (coco_2017_*_stuff_10k_sem_seg); needs h5py.

  python datasets/prepare_coco_stuff_10k_v1.0_sem_seg.py
  python datasets/prepare_coco_stuff_10k_v1.0_sem_seg.py --root /data --splits test --workers 8

Finished files are skipped, so an interrupted run goes on. Input and output: datasets/README.md
"""

from mask2former_plugin.data.preparation import coco_stuff_10k
from mask2former_plugin.data.preparation.command_line import main

if __name__ == "__main__":
    main(__doc__, coco_stuff_10k.prepare_semantic, coco_stuff_10k.SPLITS)

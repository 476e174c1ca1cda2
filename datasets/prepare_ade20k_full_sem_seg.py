#!/usr/bin/env python
"""Make ADE20K-Full's images and label maps of 847 classes (ade20k_full_sem_seg_*).

  python datasets/prepare_ade20k_full_sem_seg.py
  python datasets/prepare_ade20k_full_sem_seg.py --root /data --splits val --workers 8

Finished files are skipped, so an interrupted run goes on. Input and output: datasets/README.md
"""

from mask2former_plugin.data.preparation import ade20k_full
from mask2former_plugin.data.preparation.command_line import main

if __name__ == "__main__":
    main(__doc__, ade20k_full.prepare_semantic, ade20k_full.SPLITS)

#!/usr/bin/env python
"""Make ADE20K's instance JSON (ade20k_instance_*, AP of ade20k_panoptic_*).

  python datasets/prepare_ade20k_ins_seg.py
  python datasets/prepare_ade20k_ins_seg.py --root /data --splits val --workers 8

Finished files are skipped, so an interrupted run goes on. Input and output: datasets/README.md
"""

from mask2former_plugin.data.preparation import ade20k
from mask2former_plugin.data.preparation.command_line import main

if __name__ == "__main__":
    main(__doc__, ade20k.prepare_instances, ade20k.SPLITS)

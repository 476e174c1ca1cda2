#!/usr/bin/env python
"""Time and memory of this package, of transformers and of the original projects, side by side on this machine.

  python tools/benchmark.py --list
  python tools/benchmark.py --quick --output /tmp/try                       # small sizes: does everything run?
  python tools/benchmark.py --cases inference training --output results
  python tools/benchmark.py --sides ours ours-bf16 original --original ../Mask2Former --original ../MaskFormer
  python tools/benchmark.py --device cuda --sides ours ours-bf16 transformers transformers-bf16

Every side runs in a process of its own. All sides get the same weights and inputs, and what they compute is compared
before they are timed in turn, round by round. --output gets results.json, table.md and plots.
docs/performance.md says what is measured and how.
"""

import sys

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
from mask2former_plugin.benchmark.command_line import main

if __name__ == "__main__":
    sys.exit(main(__doc__))

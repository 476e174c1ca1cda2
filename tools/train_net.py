#!/usr/bin/env python
"""Train or evaluate MaskFormer and Mask2Former.

  python tools/train_net.py --config-file configs/quickstart/mask2former.yaml
  python tools/train_net.py --config-file … --num-gpus 8 --resume
  python tools/train_net.py --config-file … --eval-only MODEL.WEIGHTS output/model_final.pth
"""

import mask2former_plugin  # noqa: F401  (first: makes detectron2 importable)
from detectron2.engine import default_argument_parser, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from mask2former_plugin.engine import Trainer, load_for_evaluation, read_config, setup, user_errors


def main(args):
    with user_errors():
        cfg = setup(args)
    if not args.eval_only:
        # Detectron2 asserts that a dataset is not empty
        with user_errors(AssertionError, KeyError, ValueError, OSError):
            trainer = Trainer(cfg)
        with user_errors(ValueError, FileNotFoundError):
            trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    with user_errors():
        model = Trainer.build_model(cfg)
    with user_errors(ValueError, FileNotFoundError):
        load_for_evaluation(model, cfg, resume=args.resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


if __name__ == "__main__":
    arguments = default_argument_parser(epilog=__doc__).parse_args()
    if arguments.num_gpus > 1:
        # said once from here, instead of by every process and with a traceback of the one that waits for them
        with user_errors():
            read_config(arguments)
    launch(
        main,
        arguments.num_gpus,
        num_machines=arguments.num_machines,
        machine_rank=arguments.machine_rank,
        dist_url=arguments.dist_url,
        args=(arguments,),
    )

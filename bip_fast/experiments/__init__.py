"""Whole experiments on public data: what the command `bip-fast prune` and the files in `bench/` run.

resnet.py models, files.py and data.py data sets, augment.py augmentation, settings.py options, train.py the training loop, run.py run
folders, prune.py the job, display.py and curves.py what a person sees. Nothing in the engine imports this package.
"""


class ExperimentError(Exception):
    """Something the user can mend: the command line prints it as one line and exits with code 2."""

"""Whole experiments on public data: what the commands `bip-fast prune` and `compare` and the files in `bench/` run.

One run: methods.py the table of methods and their stages, scores.py criteria, optimizers.py how a stage begins, train.py the
training loop, prune.py the job, run.py run folders, display.py and curves.py what a person sees, settings.py options. Many runs: grid.py
what a file stands for, compare.py and worker.py processes, progress.py, results.py and figures.py. Models in models.py, resnet.py and
vgg.py; data sets in data.py, files.py, folders.py, streamed.py and augment.py. Nothing in the engine imports this package.
"""


class ExperimentError(Exception):
    """Something the user can mend: the command line prints it as one line and exits with code 2."""

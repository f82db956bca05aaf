"""CIFAR-10 / ResNet-20 beside the paper's figures, within minutes on one GPU: `python3 -m bench.science --help`."""

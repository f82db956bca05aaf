"""Run by test_state.py in a new process: load a checkpoint, take more steps, save what came out.

Usage: python resume_child.py BACKEND CHECKPOINT RESULT STEPS
"""

import sys

import pytest
import torch
from helpers import fill_gradients, make_model, snapshot, use_backend

from bip_fast import FastBiP


def main(name: str, checkpoint: str, result: str, steps: int) -> None:
    backend = use_backend(name, pytest.MonkeyPatch())
    saved = torch.load(checkpoint, weights_only=True, map_location=backend.device)
    model = make_model(seed=99, device=backend.device).to(saved["dtype"])  # other weights than those saved
    opt = FastBiP(model, **saved["options"])
    model.load_state_dict(saved["model"])
    opt.load_state_dict(saved["optimizer"])
    for i in range(steps):
        fill_gradients(model.parameters(), saved["next seed"] + i)
        opt.step()
    torch.save({"snapshot": snapshot(opt), "phase": opt.phase, "model": model.state_dict()}, result)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))

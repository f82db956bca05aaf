"""A small transformer that learns to spell, sharded by FSDP2 and pruned to 90 % on the way; on as many GPUs or processes as you like.

    torchrun --nproc-per-node 2 examples/sharded.py --text FILE

The mask is the one that a single process would find, whatever the number of ranks, and no rank ever has all of a weight. Every so often a
checkpoint is saved with torch.distributed.checkpoint; the same command goes on from it, on another number of ranks too. In the end one
plain file has the network with exact zeros.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from bip_fast import FastBiP

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 96, 4, 2, 64, 16


class Speller(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(text.shape[1], device=text.device)
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x, src_mask=causal, is_causal=True)
        return self.head(x)


def batch(text: torch.Tensor, step: int) -> torch.Tensor:
    """Windows of the text, others on every rank."""
    random = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=random)
    return torch.stack([text[start : start + LENGTH] for start in starts]).long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="any text")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/sharded"))
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    if gpu:
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    device = torch.device("cuda" if gpu else "cpu")
    text = torch.frombuffer(bytearray(args.text.read_bytes()), dtype=torch.uint8)

    torch.manual_seed(0)
    model = Speller().to(device)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    opt = FastBiP(model, sparsity=0.9, optimizer="adamw", preset="joint", lr=3e-3, steps=args.steps)

    checkpoint, first = args.out / "checkpoint", 0
    if checkpoint.exists():
        states = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True)) | {"step": 0}
        dcp.load(states, checkpoint_id=checkpoint)
        set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        first = states["step"]
    for step in range(first, args.steps):
        tokens = batch(text, step).to(device)
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        done = step + 1
        if done % args.save_every == 0 or done == args.steps:
            states = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True)) | {"step": done}
            dcp.save(states, storage_writer=dcp.FileSystemWriter(checkpoint, overwrite=True))
            if dist.get_rank() == 0:
                print(f"step {done} of {args.steps}: loss {loss.item():.3f}, sparsity {opt.param_groups[0]['sparsity']:.3f}", flush=True)

    report = opt.report()
    opt.finalize()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        print(report)
        save_file({name: x.contiguous() for name, x in whole.items()}, args.out / "model.safetensors")
        print(f"written: {args.out / 'model.safetensors'}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

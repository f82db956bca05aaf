"""The Trainer of transformers, with accelerate below it: names, layers, the length of the run, logs, checkpoints, the end."""

import pytest
import torch
from helpers import assert_bits

from bip_fast import FastBiP

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'bip_fast[hf]'")
pytest.importorskip("accelerate", reason="needs accelerate: pip install 'bip_fast[hf]'")
from bip_fast.integrations.transformers import BiPCallback, add_pruning, fast_bip  # noqa: E402
from bip_fast.integrations.wrapped import unwrapped  # noqa: E402

STEPS = 8
DATA = [
    {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids[1] > 25)}
    for ids in torch.randint(3, 50, (16, 6), generator=torch.Generator().manual_seed(0))
]


def bert(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 8}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, **sizes))


def arguments(folder, **options):
    common = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3, "weight_decay": 0.01, "use_cpu": True}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 2, "save_steps": 3, "seed": 1}
    return transformers.TrainingArguments(str(folder), **common | quiet | options)


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **found):
        control.should_training_stop = state.global_step == self.step


class Seen(transformers.TrainerCallback):
    """Stands for a report, which the Trainer puts before the callbacks of its user."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **found):
        self.logs.append(dict(logs))


def trained(folder, *callbacks, resume=None, args=(), **options):
    model = bert(1 if resume else 0)
    trainer = transformers.Trainer(model=model, args=arguments(folder, **dict(args)), train_dataset=DATA, callbacks=list(callbacks))
    add_pruning(trainer, **{"sparsity": 0.8, "exclude": ["classifier"]} | options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts, and what a report was told."""
    seen = Seen()
    return trained(tmp_path_factory.mktemp("whole"), seen), seen


def test_a_run_is_pruned_logged_and_finalized(whole):
    trainer, seen = whole
    opt = unwrapped(trainer.optimizer)
    report = opt.report()
    assert report.sparsity == pytest.approx(0.8, abs=1e-3)
    assert "bert.encoder.layer.0.attention.self.query.weight" in [row.name for row in report.rows]
    reasons = {row.name: row.reason for row in report.decisions}
    assert reasons["bert.embeddings.word_embeddings.weight"] == "it is an embedding"
    assert reasons["classifier.weight"] == "it is excluded"
    logs = [row for row in seen.logs if "loss" in row]
    assert len(logs) == STEPS // 2
    grown = [row["pruning/sparsity"] for row in logs]
    assert grown == sorted(grown)
    assert grown[0] < 0.7 < grown[-1] == report.sparsity
    assert [row.get("pruning/kept") for row in trainer.state.log_history if "loss" in row] == [row["pruning/kept"] for row in logs]
    with pytest.raises(RuntimeError, match="finalize"):
        opt.step()
    assert "eval_loss" in trainer.evaluate(DATA[:4])


def test_step_sizes_and_decay_are_those_of_the_trainer(whole):
    trainer, _ = whole
    groups = unwrapped(trainer.optimizer).param_groups
    assert {group["initial_lr"] for group in groups} == {1e-3}
    assert {(group["prune"], group["weight_decay"]) for group in groups} == {(True, 0.01), (False, 0.01), (False, 0.0)}


def test_a_resumed_run_has_the_bits_of_one_that_was_never_interrupted(whole, tmp_path):
    with pytest.warns(UserWarning, match="before the sparsity had grown"):
        trained(tmp_path, StopAt(3))
    resumed = trained(tmp_path, resume=True)
    assert resumed.state.global_step == STEPS
    for (name, p), expected in zip(resumed.model.named_parameters(), whole[0].model.parameters(), strict=True):
        assert_bits(p.detach(), expected.detach(), name)
    assert unwrapped(resumed.optimizer).report().rows == unwrapped(whole[0].optimizer).report().rows


def test_the_best_checkpoint_comes_back_with_its_masks(tmp_path):
    every = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True, "metric_for_best_model": "first"}
    trainer = transformers.Trainer(
        model=bert(),
        args=arguments(tmp_path, **every),
        train_dataset=DATA,
        eval_dataset=DATA[:4],
        compute_metrics=lambda _: {"first": -trainer.state.global_step},
    )
    add_pruning(trainer, sparsity=0.8, preset="paper", freeze_at=0.5)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    opt = unwrapped(trainer.optimizer)
    assert len(opt.param_groups[0]["params"]) == 0
    saved = transformers.BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    for (name, p), expected in zip(trainer.model.named_parameters(), saved.parameters(), strict=True):
        assert_bits(p.detach(), expected.detach(), name)
    assert opt.report().sparsity == pytest.approx(0.8, abs=1e-3)


def test_masks_freeze_and_the_arguments_of_the_trainer_take_the_factory(tmp_path):
    masks = []

    class Masks(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **found):
            masks.append(torch.cat([p.flatten() != 0 for name, p in model.named_parameters() if "dense.weight" in name]))

    args = arguments(tmp_path, max_steps=6, save_strategy="no")
    given = fast_bip(args, sparsity=0.5, mask_lr_per_lr=1e6, steps=None)
    callbacks = [Masks(), BiPCallback(freeze_at=0.5)]
    trainer = transformers.Trainer(model=bert(), args=args, train_dataset=DATA, optimizer_cls_and_kwargs=given, callbacks=callbacks)
    trainer.train()
    assert not torch.equal(masks[1], masks[2])
    assert all(torch.equal(mask, masks[3]) for mask in masks[4:])


def test_what_cannot_work_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="steps must be given with preset='joint'"):
        fast_bip(arguments(tmp_path), sparsity=0.5)
    assert fast_bip(arguments(tmp_path), sparsity=0.5, preset="paper")[1] == {"sparsity": 0.5, "preset": "paper"}
    trainer = transformers.Trainer(model=bert(), args=arguments(tmp_path), train_dataset=DATA, callbacks=[BiPCallback()])
    with pytest.raises(TypeError, match="must be a FastBiP, got AdamW"):
        trainer.train()
    with pytest.raises(ValueError, match="not have trained yet"):
        add_pruning(trainer, sparsity=0.5)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match="must not use DeepSpeed"):
        add_pruning(trainer, sparsity=0.5)
    with pytest.raises(ValueError, match=r"freeze_at must be in \[0, 1\], got 2"):
        BiPCallback(freeze_at=2)


def test_accelerate_alone(tmp_path):
    """Prepare, save, go on in another process's place, finalize: the same bits, also with accumulated gradients."""
    from accelerate import Accelerator

    ids, labels = torch.stack([row["input_ids"] for row in DATA]), torch.tensor([row["labels"] for row in DATA])

    def run(*, resume=False, save=False):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = bert(1 if resume else 0).eval()
        opt = FastBiP(model, sparsity=0.8, optimizer="adamw", lr=1e-3)
        model, opt = accelerator.prepare(model, opt)
        if resume:
            accelerator.load_state(tmp_path)
        for i in range(4 if resume else 0, 4 if save else 8):
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids[2 * i : 2 * i + 2], labels=labels[2 * i : 2 * i + 2]).loss)
                opt.step()
                opt.zero_grad()
        if save:
            accelerator.save_state(tmp_path)
        opt.optimizer.finalize()
        return [p.detach() for p in accelerator.unwrap_model(model).parameters()]

    expected = run()
    run(save=True)
    for given, wanted in zip(run(resume=True), expected, strict=True):
        assert_bits(given, wanted)

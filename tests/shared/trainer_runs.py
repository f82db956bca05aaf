"""Runs of trainers of other packages whose weights are sharded by FSDP2, on the ranks of a gloo job."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_runs import whole
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from bip_fast import FastBiP

STEPS = 8  # of a whole run; one that is interrupted goes on after half of them


def as_launched():
    """The environment that torchrun gives to a rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "GROUP_RANK": "0"}


def let_accelerate_shard_on_cpus():
    """accelerate turns to FSDP only on GPUs and their like ("MULTI_CPU" is not in its list), so this says that it shall
    here. All that it then does to model and optimizer is its own."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def begin_with_shards(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = begin_with_shards


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width + 1), nn.Linear(2 * width + 1, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 4))


def examples(count):
    x = torch.randn(count, 32, generator=torch.Generator().manual_seed(1))
    return x, x[:, :4].argmax(1)


def weights_of(model):
    """Of every parameter, whole, and whether any of them was sharded."""
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    return {"weights": found, "sharded": any(hasattr(p, "placements") for p in model.parameters())}


def both(kind, folder):
    """What a kind of run leaves, without an interruption and with one, in the same processes."""
    as_launched()
    if kind is not lightning:
        let_accelerate_shard_on_cpus()
    return [kind(str(Path(folder) / name), name == "stopped") for name in ("whole", "stopped")]


def accelerated(folder, stop):
    """A loop of accelerate's; until half of it and then as a new one, if ``stop``."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Block"],
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    inputs, labels = (x.chunk(STEPS * dist.get_world_size()) for x in examples(4 * STEPS * dist.get_world_size()))
    for begin, end in ((0, STEPS // 2), (STEPS // 2, STEPS)) if stop else ((0, STEPS),):
        model = network()
        model, opt = accelerator.prepare(model, FastBiP(model, sparsity=0.9, optimizer="adamw", preset="joint", steps=STEPS))
        if begin:
            accelerator.load_state(folder)
        for step in range(begin, end):
            mine = step * dist.get_world_size() + dist.get_rank()
            accelerator.backward(nn.functional.cross_entropy(model(inputs[mine]), labels[mine]))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        accelerator.save_state(folder)
        accelerator._models, accelerator._optimizers = [], []
    found = weights_of(model) | {"sparsity": opt.optimizer.report().sparsity}
    opt.optimizer.finalize()
    return found


def trainer(folder, stop):
    """The Trainer of Hugging Face with ``fsdp``; until half of the run and then from its checkpoint, if ``stop``."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

    from bip_fast.integrations.transformers import add_pruning

    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50, max_position_embeddings=16
    )
    random = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 50, (8,), generator=random), "labels": i % 2} for i in range(64)]
    fsdp = {"version": 2, "transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": "SHARDED_STATE_DICT"}

    class Interrupted(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == STEPS // 2

    for resumes in (False, True) if stop else (False,):
        torch.manual_seed(0)
        args = TrainingArguments(
            folder, use_cpu=True, max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=4, learning_rate=1e-3,
            report_to=[], logging_steps=1, disable_tqdm=True, fsdp="full_shard", fsdp_config=fsdp,
        )  # fmt: skip
        own = Trainer(BertForSequenceClassification(config), args, train_dataset=data)
        add_pruning(own, sparsity=0.9)
        if stop and not resumes:
            own.add_callback(Interrupted())
        own.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{STEPS // 2}") if resumes else None)
    return weights_of(own.model) | {"sparsity": own.state.log_history[-2]["pruning/sparsity"]}


def lightning(folder, stop):
    """Lightning with its ModelParallelStrategy; until half of the run and then from its checkpoint, if ``stop``."""
    import lightning
    from lightning.pytorch.strategies import ModelParallelStrategy

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def configure_model(self):
            mesh = self.device_mesh["data_parallel"]
            for part in self.net:
                fully_shard(part, mesh=mesh)
            fully_shard(self.net, mesh=mesh)

        def configure_optimizers(self):
            return FastBiP(self.net, sparsity=0.9, optimizer="adamw", preset="joint", steps=STEPS)

        def training_step(self, batch, number):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    saved = str(Path(folder) / "saved")
    for begin, end in ((0, 1), (1, 2)) if stop else ((0, 2),):  # epochs
        module = Module()
        own = lightning.Trainer(
            accelerator="cpu", devices=dist.get_world_size(), strategy=ModelParallelStrategy(), max_epochs=end, logger=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        )  # fmt: skip
        data = DataLoader(TensorDataset(*examples(8 * dist.get_world_size() * STEPS // 2)), batch_size=8)  # an epoch is half of the run
        own.fit(module, data, ckpt_path=saved if begin else None)
        own.save_checkpoint(saved)
    opt = own.optimizers[0]
    return weights_of(module.net) | {"sparsity": opt.report().sparsity}

"""Shared by the tests of `bip_fast.graphs`: the same training twice, and what stands in for CUDA graphs where there is no GPU."""

import warnings
from contextlib import nullcontext

import torch
from helpers import assert_bits, assert_same_snapshot, batch, make_model, snapshot
from lockstep import MOVING
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

from bip_fast import FastBiP
from bip_fast.graphs import GraphedIteration


class Double:
    """Stands in for `CudaRecorder` on the CPU."""

    made: list["Double"]
    watched: tuple = ()  # (model, optimizer): what a replay must find as the record did; none by default

    def __init__(self, device):
        self.records = self.replays = self.warmings = 0
        Double.made.append(self)

    def warming(self):
        self.warmings += 1
        return nullcontext()

    def baked(self):
        if not self.watched:
            return []
        model, opt = self.watched
        seen = [module.training for module in model.modules()]
        seen += [(t.data_ptr(), t.requires_grad, t.grad is None) for t in (*model.parameters(), *model.buffers())]
        return [*seen, getattr(opt, "phase", None), id(getattr(getattr(opt, "_engine", None), "plan", None))]

    def record(self, body):
        self.records += 1
        baked, own = self.baked(), []

        def replay():
            assert self.baked() == baked, "a graph would not see this change"
            self.replays += 1
            results, gradients = body()
            for p in self.watched[0].parameters() if self.watched else ():
                p.grad = None  # a graph writes memory; it does not set attributes
            parts = results if isinstance(results, tuple) else (results,)
            own.extend(parts[len(own) :])
            for to, x in zip(own, parts, strict=True):
                to.copy_(x)  # every replay writes its results to the same place
            return (tuple(own) if isinstance(results, tuple) else own[0]), gradients

        return replay


class Uncapturable(Double):
    def record(self, body):
        super().record(body)
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        except RuntimeError:
            raise RuntimeError("capture_end: operation failed due to a previous error") from None


def plain_step(model, opt, x, y, autocast=None):
    """The loop of the README."""
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        loss = cross_entropy(model(x), y)
    loss.backward()
    opt.step()
    opt.zero_grad()
    return loss.detach()


class Pair:
    """The same training twice: graphed and by the plain loop."""

    def __init__(self, *, device=None, make_optimizer=FastBiP, model=None, prepare=lambda model: model, iteration=None, **options):
        options = options if make_optimizer is not FastBiP else MOVING | options
        self.device, self.autocast = device, (iteration or {}).get("autocast")
        self.models = [prepare(model() if model else make_model(device=device)) for _ in range(2)]
        self.opts = [make_optimizer(m if make_optimizer is FastBiP else m.parameters(), **options) for m in self.models]
        Double.watched = self.models[0], self.opts[0]
        self.iteration = GraphedIteration(self.models[0], self.opts[0], cross_entropy, **(iteration or {}))

    def step(self, seed, n=8):
        """One step of both on the same batch; the losses are equal bit for bit."""
        x, y = batch(seed, self.device, n)
        x = x.to(next(self.models[0].parameters()).dtype) if self.autocast is None else x
        x = x.to(memory_format=torch.channels_last) if self.models[0].conv.weight.stride()[1] == 1 else x
        loss = self.iteration(x, y)
        assert all(p.grad is None for p in self.models[0].parameters())
        assert not loss.requires_grad
        assert_bits(loss, plain_step(self.models[1], self.opts[1], x, y, self.autocast), f"loss of step {seed}")

    def steps(self, count, first=0, **options):
        for i in range(count):
            self.step(first + i, **options)

    def each(self, change):
        for model, opt in zip(self.models, self.opts, strict=True):
            change(model, opt)

    def check(self):
        given, expected = (model.state_dict() for model in self.models)
        for name in expected:
            assert_bits(given[name], expected[name], name)
        if isinstance(self.opts[0], FastBiP):
            assert_same_snapshot(snapshot(self.opts[0]), snapshot(self.opts[1]))
            assert self.opts[0].phase == self.opts[1].phase


def whole_run(pair):
    """Schedulers, another number of kept weights, a last smaller batch in each epoch, phases by hand, freezing."""
    schedulers = [lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=40) for opt in pair.opts]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler")  # it did not see the optimizer step
        for i in range(24):
            pair.step(i, n=5 if i % 8 == 7 else 8)
            for scheduler in schedulers:
                scheduler.step()
            if i == 13:
                pair.each(lambda model, opt: opt.param_groups[0].update(sparsity=0.6, mask_lr=0.1, weight_decay=0.0))
            if i == 17:
                pair.each(lambda model, opt: opt.freeze_masks())
    pair.check()


LEVELS = ["alternating", "joint"]

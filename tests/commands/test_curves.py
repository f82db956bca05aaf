"""The picture of a run: what its axes and its legend say."""

import warnings

import pytest
from matplotlib.figure import Figure

from bip_fast.experiments.runs.curves import curves


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The axes of the picture of a run with these losses, by stage."""
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *arguments, **options: kept.append(self))

    def draw(**losses):
        history = {stage: [{"loss": x, "accuracy": 0.5, "mask_changes": 0.1} for x in rows] for stage, rows in losses.items()}
        report = {"history": history, "method": "bip", "sparsity": 0.9, "evaluated_on": "test", "pruned": {"accuracy": 0.5}}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            curves(report, tmp_path / "curves.png")
            kept[-1].canvas.draw()
        return kept[-1].axes

    return draw


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()] if axes.get_legend() else None


@pytest.mark.parametrize(("losses", "scale"), [([0.6, 0.4], "linear"), ([2.0, 0.3, 0.01], "log"), ([2.0, 0.0], "linear")])
def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis_with_plain_numbers(drawn, losses, scale):
    loss, *_ = drawn(pretrain=[], prune=losses)
    assert loss.get_yscale() == scale
    labels = [text.get_text() for text in loss.get_yticklabels() if text.get_text()]
    assert len(labels) >= 3
    assert all(set(label) <= set("\N{MINUS SIGN}0123456789.") for label in labels)


def test_the_legend_names_what_the_run_did(drawn):
    assert legend(drawn(pretrain=[], prune=[0.6, 0.4])[0]) == ["pruning, 90 % zeros"]
    assert legend(drawn(pretrain=[0.9], prune=[0.6], finetune=[0.5])[0]) == ["dense training", "pruning, 90 % zeros"]
    assert legend(drawn(prune=[])[0]) is None  # pruned at once, without training


def test_epochs_are_whole(drawn):
    for axes in drawn(pretrain=[0.9], prune=[0.6]):
        assert all(tick == int(tick) for tick in axes.get_xticks())

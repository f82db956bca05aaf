"""What is pruned of the classes that people fine-tune, and some steps of each in every pattern: random instances of `transformers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lockstep import Lockstep
from torch import Tensor, nn

from bip_fast import FastBiP, reference
from bip_fast.engine.layers import Layer, weights

transformers = pytest.importorskip("transformers", reason="needs the package transformers: pip install 'bip-fast[test]'")

WIDTH, WORDS, LAYERS = 32, 50, 2
ATTENTION, MLP = 4 * WIDTH * WIDTH, 2 * WIDTH * 64  # of one layer: queries, keys, values, outputs; and two matrices
GROUPED, GATED = 3 * WIDTH * WIDTH, 3 * WIDTH * 64  # half as many keys and values; and a gate
EMBEDDING, ROUTER = "it is an embedding", "it chooses among experts"
NO_LAYER = "it is not a matrix of a layer that is pruned; bip_fast.register_layer adds layers"
COMMON = {"hidden_size": WIDTH, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": LAYERS}
DECODER = {**COMMON, "vocab_size": WORDS, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
DECODER |= {"bos_token_id": 1, "eos_token_id": 2}


def ids(length: int = 6) -> Tensor:
    return torch.randint(3, WORDS, (2, length), generator=torch.Generator().manual_seed(3))


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def decoder(family: str, **options: Any) -> nn.Module:
    config = getattr(transformers, "Llama4TextConfig" if family == "Llama4" else f"{family}Config")
    return getattr(transformers, f"{family}ForCausalLM")(config(**DECODER, **options))


def bert() -> nn.Module:
    config = transformers.BertConfig(vocab_size=WORDS, max_position_embeddings=16, **COMMON)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=WORDS, bos_token_id=1, eos_token_id=2, **sizes))


def t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 64, "num_layers": LAYERS, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=WORDS, decoder_start_token_id=0, **sizes))


def vit() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **COMMON))


def whisper() -> nn.Module:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in [("layers", 1), ("attention_heads", 4), ("ffn_dim", 64)]}
    places = {"max_source_positions": 16, "max_target_positions": 12}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(vocab_size=WORDS, num_mel_bins=8, d_model=WIDTH, **sides, **places, **tokens)
    return transformers.WhisperForConditionalGeneration(config)


class Case(NamedTuple):
    """``pruned`` weights are candidates; ``dense`` says how many entries stay, by reason."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    pruned: int
    dense: dict[str, int]


WORD, SHARED = WORDS * WIDTH, f"{EMBEDDING}, which lm_head shares"
EXPERTS = {"num_experts_per_tok": 2}
tokens = lambda: {"input_ids": ids()}  # noqa: E731
CASES = {
    "bert": Case(bert, tokens, LAYERS * (ATTENTION + MLP) + WIDTH * WIDTH + 2 * WIDTH, {EMBEDDING: WORD + (16 + 2) * WIDTH}),
    "gpt2": Case(gpt2, tokens, LAYERS * 12 * WIDTH * WIDTH, {SHARED: WORD, EMBEDDING: 16 * WIDTH}),
    "llama": Case(lambda: decoder("Llama"), tokens, LAYERS * (GROUPED + GATED) + WORD, {EMBEDDING: WORD}),
    "llama, tied": Case(lambda: decoder("Llama", tie_word_embeddings=True), tokens, LAYERS * (GROUPED + GATED), {SHARED: WORD}),
    "qwen3-moe": Case(
        lambda: decoder("Qwen3Moe", num_experts=4, moe_intermediate_size=16, head_dim=8, **EXPERTS),
        tokens,
        LAYERS * (GROUPED + 4 * 3 * WIDTH * 16) + WORD,
        {EMBEDDING: WORD, ROUTER: LAYERS * 4 * WIDTH},
    ),
    "mixtral": Case(
        lambda: decoder("Mixtral", num_local_experts=4, **EXPERTS),
        tokens,
        LAYERS * (GROUPED + 4 * GATED) + WORD,
        {EMBEDDING: WORD, ROUTER: LAYERS * 4 * WIDTH},
    ),
    "t5": Case(
        t5,
        lambda: {"input_ids": ids(), "decoder_input_ids": ids(4)},
        LAYERS * (3 * ATTENTION + 2 * MLP),
        {SHARED: WORD, EMBEDDING: 2 * 32 * 4},  # and a bias for each of 32 distances and 4 heads, in either half
    ),
    "vit": Case(
        vit,
        lambda: {"pixel_values": noise(2, 3, 16, 16)},
        3 * 16 * WIDTH + LAYERS * (ATTENTION + MLP) + 2 * WIDTH,
        {NO_LAYER: (1 + 17) * WIDTH},  # the token of the class, and places
    ),
    "whisper": Case(
        whisper,
        lambda: {"input_features": noise(2, 8, 32), "decoder_input_ids": ids(4)},
        3 * 8 * WIDTH + 3 * WIDTH * WIDTH + 3 * ATTENTION + 2 * MLP,
        {f"{EMBEDDING}, which proj_out shares": WORD, EMBEDDING: 12 * WIDTH, "it is frozen": 16 * WIDTH},
    ),
}
MIXTURES = ("qwen3-moe", "mixtral")


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].build()


def backward(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    model(**inputs)[0].float().square().mean().backward()


@pytest.mark.parametrize("name", CASES)
def test_what_is_pruned(name):
    case, model = CASES[name], made(name)
    report = FastBiP(model, sparsity=0.5).report()
    sizes = {key: p.numel() for key, p in model.named_parameters() if p.dim() >= 2}
    assert {row.name for row in report.decisions} == sizes.keys()
    assert report.total == case.pruned
    assert [row.name for row in report] == [key for key, _ in weights(model)]
    dense: dict[str | None, int] = {}
    for row in report.decisions:
        if row.pattern is None:
            dense[row.reason] = dense.get(row.reason, 0) + sizes[row.name]
    assert dense == case.dense
    assert report.kept == reference.kept(case.pruned, 0.5)


def layers_of(model: nn.Module) -> tuple[dict[Tensor, Layer], list[list[Tensor]]]:
    """Orientation of every weight, and weights with the biases that go with their filters, written down here a second time."""
    from transformers.pytorch_utils import Conv1D

    known = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, Conv1D))]
    oriented = {module.weight: Layer(transposed=isinstance(module, Conv1D)) for module in known}
    return oriented, [[module.weight, module.bias] for module in known if module.bias is not None]


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "channel", "2:4", "block:4x8"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in MIXTURES])
def test_steps_in_every_pattern(name, pattern):
    """Bit for bit the reference, with the gradients of the model's own backward."""
    model, inputs = made(name), CASES[name].inputs()
    options = {"pattern": pattern, "lr": 0.05, "mask_lr": 50.0, "levels": "joint", "sparsity": 0.6}
    if pattern == "2:4":
        del options["sparsity"]
    if (name, pattern) == ("gpt2", "2:4"):
        with pytest.raises(ValueError, match=r"nothing to prune: .* not neighbours in memory in a transposed weight"):
            FastBiP(model, **options)
        return
    pruned = {row.name for row in FastBiP(made(name), **options).report()}
    oriented, biases = layers_of(model)
    of_pruned = {p for key, p in model.named_parameters() if key in pruned}
    coupled = [pair for pair in biases if pattern == "filter" and pair[0] in of_pruned]
    learning = [p for p in model.parameters() if p.requires_grad]
    lock = Lockstep(learning, lambda: FastBiP(model, **options), of_pruned, oriented, coupled)
    before = [lock.opt.mask_of(p) for p in of_pruned]
    for _ in range(2):
        backward(model, inputs)
        lock.step()
        model.zero_grad()
    assert any(not torch.equal(lock.opt.mask_of(p), mask) for p, mask in zip(of_pruned, before, strict=True)), "masks move"


@pytest.mark.parametrize("pattern", ["unstructured", "filter", "channel", "2:4", "block:4x8"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_in_every_pattern(name, pattern):
    """What a stack of experts does is compared bit for bit in `test_stacked_layers`; here the real classes run."""
    model, inputs = made(name), CASES[name].inputs()
    options = {} if pattern == "2:4" else {"sparsity": 0.6}
    opt = FastBiP(model, pattern=pattern, scope="layer", lr=0.05, mask_lr=1e5, levels="joint", **options)
    experts = [p for key, p in model.named_parameters() if ".experts." in key]
    before = [opt.mask_of(p) for p in experts]
    assert len(experts) == 2 * LAYERS
    for _ in range(2):
        backward(model, inputs)
        opt.step()
        model.zero_grad()
    for p in opt.pruned_params:
        assert torch.equal(p, torch.where(opt.mask_of(p), opt.weight_of(p), torch.zeros(())))
    for p in experts:
        mask = opt.mask_of(p)
        if pattern == "unstructured":
            assert mask.sum((1, 2)).tolist() == [reference.kept(p[0].numel(), 0.6)] * 4
        elif pattern == "2:4":
            assert bool((mask.view(-1, 4).sum(1) == 2).all())
        elif pattern in ("filter", "channel"):
            along = 2 if pattern == "filter" else 1
            assert torch.equal(mask.all(along), mask.any(along))
            assert mask.any(along).sum(1).tolist() == [reference.kept(p.shape[3 - along], 0.6)] * 4
        else:
            blocks = mask.view(4, p.shape[1] // 4, 4, p.shape[2] // 8, 8)
            assert torch.equal(blocks.all(4).all(2), blocks.any(4).any(2))
    assert any(not torch.equal(opt.mask_of(p), mask) for p, mask in zip(experts, before, strict=True)), "masks move"


@pytest.mark.parametrize("family", ["GptOss", "Llama4"])
def test_experts_that_are_stored_transposed(family):
    torch.manual_seed(0)
    options = {"intermediate_size_mlp": 64} if family == "Llama4" else {}
    model = decoder(family, num_local_experts=4, head_dim=8, num_experts_per_tok=1, **options)
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer")
    report = opt.report()
    assert sum(row.total for row in report if ".experts." in row.name) == LAYERS * 4 * GATED
    assert {row.reason for row in report.decisions if "router" in row.name} == {ROUTER}
    for key, p in model.named_parameters():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            mask = opt.mask_of(p)
            assert torch.equal(mask.all(1), mask.any(1)), "columns"
            assert mask.any(1).sum(1).tolist() == [p.shape[2] // 2] * 4
    biases = {row.name for row in report.decisions if row.name.endswith("_proj_bias")}
    assert len(biases) == (2 * LAYERS if family == "GptOss" else 0)
    assert not biases & {row.name for row in report}


def test_experts_below_each_other():
    """Of DBRX: all experts in one matrix, the last stored transposed."""
    config = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}
    sizes = {"d_model": WIDTH, "n_heads": 4, "n_layers": 1, "vocab_size": WORDS, "max_seq_len": 16}
    attention = {"kv_n_heads": 2, "rope_theta": 1e4}
    model = transformers.DbrxForCausalLM(transformers.DbrxConfig(**sizes, ffn_config=config, attn_config=attention))
    opt = FastBiP(model, sparsity=0.5, pattern="filter", scope="layer")
    experts = model.transformer.blocks[0].ffn.experts.mlp
    assert [row.units for row in opt.report() if ".experts." in row.name] == [(32, 64), (32, 64), (64, 128)]
    for p in (experts.w1, experts.v1):
        assert opt.mask_of(p).view(4, 16, WIDTH).all(2).sum(1).tolist() == [8] * 4
    assert opt.mask_of(experts.w2).view(4, 16, WIDTH).all(1).sum(1).tolist() == [16] * 4
    reasons = {row.name: row.reason for row in opt.report().decisions}
    assert reasons["transformer.blocks.0.ffn.router.layer.weight"] == ROUTER


def test_a_tied_embedding_learns_and_stays_whole():
    model = made("llama, tied")
    opt = FastBiP(model, sparsity=0.9, lr=0.05)
    before = model.lm_head.weight.detach().clone()
    backward(model, tokens())
    opt.step()
    opt.finalize()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert int((model.lm_head.weight == 0).sum()) == int((before == 0).sum())
    assert not torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("name", "pattern", "dense"),
    [
        ("bert", "filter", {"classifier.weight"}),
        ("bert", "channel", set()),  # the embedding comes first
        ("gpt2", "filter", set()),  # the embedding makes the outputs
        ("llama", "filter", {"lm_head.weight"}),
        ("vit", "channel", {"vit.embeddings.patch_embeddings.projection.weight"}),
        ("whisper", "channel", {"model.encoder.conv1.weight"}),
        ("whisper", "filter", set()),
    ],
)
def test_the_ends(name, pattern, dense):
    report = FastBiP(made(name), sparsity=0.5, pattern=pattern).report()
    assert {row.name for row in report.decisions if row.reason and "layer of the model" in row.reason} == dense

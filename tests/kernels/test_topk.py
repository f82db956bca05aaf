"""`bip_fast.topk_mask`: equal to the reference, entry by entry, whatever the scores, the size, the backend or the number of threads."""

import os

import pytest
import torch
from helpers import ADVERSARIAL, BOUNDARY_NK, assert_bits, bits, from_bits

from bip_fast import reference, topk_mask

hypothesis = pytest.importorskip("hypothesis", reason="needs the package hypothesis: pip install 'bip-fast[test]'")
st = hypothesis.strategies


def check(scores, k, device):
    given = topk_mask(scores.to(device), k)
    assert given.device.type == device.type
    assert_bits(given, reference.topk_mask(scores.float(), k), f"n={scores.numel()} k={k}")


def check_all(cases, device):
    for scores, k in cases:
        check(scores, k, device)


@pytest.mark.sanitizer
def test_boundary_sizes(backend):
    for n, k in BOUNDARY_NK:
        scores = torch.rand(n, generator=backend.generator(n))
        check(scores, k, backend.device)
        check(scores.mul(8).round(), k, backend.device)  # ties everywhere


@pytest.mark.sanitizer
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_adversarial_scores(backend, name):
    for n in (33, 1025):
        scores = ADVERSARIAL[name](n)
        check_all([(scores, k) for k in (0, 1, n // 3, n // 2, n // 2 + 1, n - 1, n)], backend.device)


def test_several_blocks(backend):
    """Many blocks or tiles on every backend, k from nothing to everything."""
    n = 20_000
    scores = torch.randn(n, generator=backend.generator(1))
    check_all([(scores, k) for k in (0, 1, 2, 999, 1000, 1001, n // 2, n - 1, n)], backend.device)
    check_all([(torch.full((n,), 0.5), k) for k in (1, 1000, n - 1)], backend.device)
    check_all([(scores.clamp(0, 1), k) for k in (1, 1000, n // 4, n - 1)], backend.device)  # two piles, at 0 and 1


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_and_many_threads(backend, threads):
    """Large enough for every thread to have work; on the simulator, smaller."""
    n = 20_011 if backend.name == "sim" else 150_007
    torch.set_num_threads(threads)
    scores = torch.randn(n, generator=backend.generator(2)).mul(64).round().div(64).clamp(0, 1)
    check_all([(scores, k) for k in (1, n // 100, n // 2, n - 3)], backend.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores(backend, dtype):
    scores = torch.randn(1000, generator=backend.generator(3)).to(dtype)
    check_all([(scores, k) for k in (0, 1, 333, 1000)], backend.device)


def test_every_half_precision_bit_pattern(backend):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    if backend.name == "sim":
        patterns = patterns[::7]
    for dtype in (torch.bfloat16, torch.float16):
        check(patterns.view(dtype), patterns.numel() // 3, backend.device)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7, 11), (2, 3, 4, 5)])
def test_shapes(backend, shape):
    scores = torch.rand(shape, generator=backend.generator(4))
    for k in sorted({0, scores.numel() // 2, scores.numel()}):
        check(scores, k, backend.device)


def test_any_layout_is_taken_in_flatten_order(backend):
    scores = torch.rand(6, 8, 5, 4, generator=backend.generator(5)).mul(9).round()
    channels_last = scores.contiguous(memory_format=torch.channels_last)
    layouts = [channels_last, scores.permute(2, 0, 3, 1), scores[::2, 1:, ::3], scores[:1].expand(4, 8, 5, 4)]
    check_all([(layout, layout.numel() // 3) for layout in layouts], backend.device)


def test_an_offset_into_a_storage(backend):
    """Scores that start at any multiple of four bytes: no vector load may assume more."""
    storage = torch.rand(1100, generator=backend.generator(6)).to(backend.device)
    for offset in (1, 2, 3, 5):
        scores = storage[offset : offset + 1030]
        assert_bits(topk_mask(scores, 500), reference.topk_mask(scores.cpu(), 500), f"offset {offset}")


def test_input_is_untouched_and_needs_no_grad(backend):
    scores = torch.rand(500, generator=backend.generator(7)).to(backend.device).requires_grad_()
    before, version = bits(scores).clone(), scores._version
    mask = topk_mask(scores, 100)
    assert torch.equal(bits(scores), before)
    assert scores._version == version
    assert not mask.requires_grad


def test_the_same_mask_every_time(backend):
    scores = torch.rand(5000, generator=backend.generator(8)).mul(4).round().to(backend.device)
    first = topk_mask(scores, 1234)
    for _ in range(5):
        assert_bits(topk_mask(scores, 1234), first)


def test_masks_are_nested(backend):
    """A mask of k ones contains every smaller one: the order does not depend on k."""
    scores = torch.rand(700, generator=backend.generator(9)).mul(3).round().to(backend.device)
    previous = topk_mask(scores, 0)
    for k in range(1, 701, 13):
        mask = topk_mask(scores, k)
        assert int(mask.sum()) == k
        assert bool((mask | ~previous).all())
        previous = mask


@pytest.mark.skipif(not os.environ.get("BIP_FAST_LARGE_TESTS"), reason="needs 12 GB of memory and BIP_FAST_LARGE_TESTS=1")
def test_more_scores_than_31_bits_can_count(backend):
    if backend.name == "sim":
        pytest.skip("needs hours on the simulator")
    n = 2**31 + 1000
    scores = torch.zeros(n, device=backend.device)
    largest = [7, 2**31 + 5, n - 1]
    scores[largest] = torch.tensor([1.0, 2.0, 3.0], device=backend.device)
    mask = topk_mask(scores, 5)
    # Of the zeros, the two whose index * 2654435761 mod 2**32 is lowest: index 0, and the inverse of 1.
    assert 244002641 * 2654435761 % 2**32 == 1
    expected = {*largest, 0, 244002641}
    found = {i * 2**24 + int(j) for i, part in enumerate(mask.split(2**24)) for j in part.nonzero().flatten()}
    assert found == expected


@hypothesis.settings(max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(data=st.data())
def test_any_bit_patterns(backend, data):
    """Any float32 bits in any shape, drawn from few patterns so that ties are common."""
    shape = data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=4).map(tuple), label="shape")
    palette = data.draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=12), label="bit patterns")
    seed = data.draw(st.integers(0, 2**16), label="seed")
    pick = torch.randint(len(palette), shape, generator=torch.Generator().manual_seed(seed))
    scores = from_bits(torch.tensor(palette)[pick])
    check(scores, data.draw(st.integers(0, scores.numel()), label="k"), backend.device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64])
def test_unsupported_dtype(backend, dtype):
    with pytest.raises(TypeError, match=f"scores must be .*float32.*got .*{dtype}"):
        topk_mask(torch.ones(4, device=backend.device).to(dtype), 2)


@pytest.mark.parametrize("scores", [[0.1, 0.2], None, torch.eye(3).to_sparse()], ids=["list", "none", "sparse"])
def test_unsupported_scores(scores):
    with pytest.raises(TypeError, match="scores must be a dense tensor"):
        topk_mask(scores, 1)


@pytest.mark.parametrize("k", [-1, 5, 2**40])
def test_k_out_of_range(backend, k):
    with pytest.raises(ValueError, match=rf"k must be in \[0, 4\].*got {k}"):
        topk_mask(torch.ones(4, device=backend.device), k)


@pytest.mark.parametrize("k", [1.0, "1", None])
def test_k_not_an_integer(k):
    with pytest.raises(TypeError, match="k must be an integer"):
        topk_mask(torch.ones(4), k)


def test_a_device_without_kernels():
    with pytest.raises(RuntimeError, match="meta"):
        topk_mask(torch.ones(4, device="meta"), 2)

"""The array operations against literal loops, in the three frameworks; cuts, dtypes, refusals, kernels, gradients."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from frameworks import FRAMEWORKS, HALVES, in_float64
from hypothesis import given
from hypothesis import strategies as st
from posttrain import ops as ops_module
from posttrain.data import offsets_of, to_numpy
from posttrain.ops import (
    framework_of,
    like,
    ops_of,
    reverse_recurrence,
    segment_deviation,
    segment_mean,
    segment_std,
    segment_sum,
    selective_log_softmax,
    use_kernels,
    whiten,
)

every_framework = pytest.mark.parametrize("framework", FRAMEWORKS)
lengths_of_episodes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def loop(decay: np.ndarray, x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """The definition, one action after the other, in float64."""
    y = np.zeros(len(x))
    for start, end in pairwise(offsets):
        following = 0.0
        for t in range(end - 1, start - 1, -1):
            y[t] = x[t] + (decay[t] * following if t < end - 1 else 0.0)
            following = y[t]
    return y


def case(lengths: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    N = sum(lengths)
    return rng.uniform(0, 1.05, N), rng.normal(size=N), offsets_of(np.array(lengths))


class TestReverseRecurrence:
    @given(lengths=lengths_of_episodes, seed=st.integers(0, 99))
    def test_equals_the_loop(self, lengths: list[int], seed: int) -> None:
        decay, x, offsets = case(lengths, seed)
        np.testing.assert_allclose(reverse_recurrence(decay, x, offsets), loop(decay, x, offsets), rtol=1e-13,
                                   atol=1e-13)

    @every_framework
    def test_is_the_same_in_every_framework(self, framework: str) -> None:
        decay, x, offsets = case([4, 1, 33, 2])
        with in_float64(framework):
            y = reverse_recurrence(FRAMEWORKS[framework](decay), FRAMEWORKS[framework](x), offsets)
            assert framework_of(y) == framework
            np.testing.assert_array_equal(to_numpy(y), reverse_recurrence(decay, x, offsets))

    @pytest.mark.parametrize("framework", ["numpy", "torch"])
    @given(lengths=lengths_of_episodes, seed=st.integers(0, 99))
    def test_the_form_for_accelerators_equals_the_loop(self, framework: str, lengths: list[int], seed: int) -> None:
        decay, x, offsets = case(lengths, seed)
        y = ops_module._doubling(FRAMEWORKS[framework](decay), FRAMEWORKS[framework](x), offsets)
        np.testing.assert_allclose(to_numpy(y), loop(decay, x, offsets), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("window", [1, 2, 7, 64])
    @given(lengths=lengths_of_episodes, seed=st.integers(0, 99))
    def test_windows_change_nothing(self, window: int, lengths: list[int], seed: int) -> None:
        decay, x, offsets = case(lengths, seed)
        whole = reverse_recurrence(decay, x, offsets)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ops_module, "_WINDOW", window)
            np.testing.assert_array_equal(reverse_recurrence(decay, x, offsets), whole)

    def test_in_a_jax_trace(self) -> None:
        jax = pytest.importorskip("jax")
        decay, x, offsets = case([3, 1, 17, 5])
        with in_float64("jax"):
            y = jax.jit(lambda d, x: reverse_recurrence(d, x, offsets))(jax.numpy.asarray(decay), jax.numpy.asarray(x))
            np.testing.assert_allclose(np.asarray(y), loop(decay, x, offsets), rtol=1e-13, atol=1e-13)

    @every_framework
    def test_one_decay_for_all(self, framework: str) -> None:
        _, x, offsets = case([4, 9, 1])
        x = x.astype(np.float32)
        y = to_numpy(reverse_recurrence(0.9, FRAMEWORKS[framework](x), offsets))
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, loop(np.full(14, 0.9), x, offsets), rtol=1e-5)

    @given(lengths=lengths_of_episodes, seed=st.integers(0, 99))
    def test_an_episode_does_not_know_its_neighbours(self, lengths: list[int], seed: int) -> None:
        decay, x, offsets = case(lengths, seed)
        together = reverse_recurrence(decay, x, offsets)
        for start, end in pairwise(offsets):
            alone = reverse_recurrence(decay[start:end], x[start:end], np.array([0, end - start]))
            np.testing.assert_array_equal(together[start:end], alone)

    @every_framework
    def test_an_overflow_stays_in_its_episode(self, framework: str) -> None:
        offsets = np.array([0, 2, 5, 7])
        x = np.array([1, 2, 3e38, 3e38, 3e38, 4, 5], np.float32)
        y = to_numpy(reverse_recurrence(1.0, FRAMEWORKS[framework](x), offsets))
        np.testing.assert_array_equal(y[[0, 1, 5, 6]], [3, 2, 9, 5])
        np.testing.assert_array_equal(y[[2, 3, 4]], np.array([np.inf, np.inf, 3e38], np.float32))

    @every_framework
    def test_large_finite_numbers_are_not_refused(self, framework: str) -> None:
        x = np.full(4, 3e38, np.float32)  # their sum is not finite
        y = to_numpy(reverse_recurrence(0.0, FRAMEWORKS[framework](x), np.array([0, 4])))
        np.testing.assert_array_equal(y, x)

    @every_framework
    def test_the_last_decay_is_ignored_whatever_it_is(self, framework: str) -> None:
        make = FRAMEWORKS[framework]
        y = reverse_recurrence(make(np.array([0.5, np.nan, np.inf], np.float32)), make(np.ones(3, np.float32)),
                               np.array([0, 2, 3]))
        np.testing.assert_array_equal(to_numpy(y), np.array([1.5, 1.0, 1.0], np.float32))

    @every_framework
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_refuses_what_is_not_finite_and_names_the_episode(self, framework: str, bad: float) -> None:
        make = FRAMEWORKS[framework]
        offsets, good = np.array([0, 2, 5]), np.ones(5, np.float32)
        broken = good.copy()
        broken[3] = bad
        with pytest.raises(ValueError, match=r"^x of .* at action 1 of episode 1"):
            reverse_recurrence(0.9, make(broken), offsets)
        with pytest.raises(ValueError, match=r"^decay of .* at action 1 of episode 1"):
            reverse_recurrence(make(broken), make(good), offsets)

    def test_refuses_columns_that_do_not_fit(self) -> None:
        for decay, x, offsets in [(np.ones(2), np.ones(3), [0, 3]), (0.5, np.ones(3), [0, 2]),
                                  (0.5, np.ones((1, 3)), [0, 1])]:
            with pytest.raises(ValueError, match="flat ragged column"):
                reverse_recurrence(decay, x, np.array(offsets))

    @every_framework
    def test_nothing_and_a_single_action(self, framework: str) -> None:
        make = FRAMEWORKS[framework]
        for offsets in (np.array([0]), np.array([0, 0])):
            assert to_numpy(reverse_recurrence(0.9, make(np.zeros(0, np.float32)), offsets)).shape == (0,)
        y = reverse_recurrence(make(np.ones(1, np.float32)), make(np.full(1, 7.0, np.float32)), np.array([0, 1]))
        assert to_numpy(y).tolist() == [7.0]

    @pytest.mark.parametrize("half", HALVES)
    def test_half_precision_is_computed_in_float32(self, half: str) -> None:
        decay, x, offsets = case([300, 200])
        decay, x = HALVES[half](np.minimum(decay, 1.0)), HALVES[half](x)
        exact = [np.asarray(a.float() if half.startswith("torch") else a).astype(np.float64) for a in (decay, x)]
        y = reverse_recurrence(decay, x, offsets)
        assert "float32" in str(y.dtype)
        np.testing.assert_allclose(to_numpy(y), loop(*exact, offsets), rtol=1e-4, atol=1e-4)

    def test_the_wider_dtype_decides_and_integers_are_numbers(self) -> None:
        offsets = np.array([0, 2])
        assert reverse_recurrence(np.ones(2), np.ones(2, np.float32), offsets).dtype == np.float64
        assert reverse_recurrence(np.ones(2, np.float32), np.ones(2), offsets).dtype == np.float64
        np.testing.assert_array_equal(reverse_recurrence(0.5, np.array([1, 1]), offsets), [1.5, 1.0])

    @every_framework
    def test_does_not_change_what_it_is_given(self, framework: str) -> None:
        decay, x, offsets = case([5, 3])
        arrays = [FRAMEWORKS[framework](a.astype(np.float32)) for a in (decay, x)]
        before = [to_numpy(a).copy() for a in (*arrays, offsets)]
        reverse_recurrence(*arrays, offsets)
        for a, b in zip((*arrays, offsets), before):
            np.testing.assert_array_equal(to_numpy(a), b)

    def test_reads_strided_columns(self) -> None:
        decay, x, offsets = case([5, 3])
        np.testing.assert_array_equal(
            reverse_recurrence(np.repeat(decay, 2)[::2], np.repeat(x, 2)[::2], offsets),
            reverse_recurrence(decay, x, offsets))

    def test_carries_no_gradient_in_torch(self) -> None:
        x = FRAMEWORKS["torch"](np.ones(4)).requires_grad_()
        assert not reverse_recurrence(x, x, np.array([0, 4])).requires_grad

    def test_carries_no_gradient_in_jax(self) -> None:
        jax = pytest.importorskip("jax")
        gradient = jax.grad(lambda x: reverse_recurrence(0.9, x, np.array([0, 4])).sum())(jax.numpy.ones(4))
        np.testing.assert_array_equal(np.asarray(gradient), np.zeros(4))


class TestSegments:
    ids = np.array([2, 0, 2, 2, 0])
    x = np.array([1.0, 2.0, 4.0, 9.0, 6.0])

    @every_framework
    def test_sums_rows(self, framework: str) -> None:
        make = FRAMEWORKS[framework]
        np.testing.assert_array_equal(to_numpy(segment_sum(make(self.x), make(self.ids), 4)), [8, 0, 14, 0])
        rows = make(np.stack([self.x, -self.x]))
        np.testing.assert_array_equal(to_numpy(segment_sum(rows, make(self.ids), 3)), [[8, 0, 14], [-8, 0, -14]])

    @every_framework
    def test_of_nothing(self, framework: str) -> None:
        make = FRAMEWORKS[framework]
        empty, ids = make(np.zeros(0, np.float32)), make(np.zeros(0, np.int64))
        np.testing.assert_array_equal(to_numpy(segment_sum(empty, ids, 2)), [0, 0])

    def test_half_precision_is_summed_in_float32(self) -> None:
        ones = HALVES["torch bfloat16"](np.ones(1000))
        assert segment_sum(ones, FRAMEWORKS["torch"](np.zeros(1000, np.int64)), 1).tolist() == [1000.0]

    @every_framework
    def test_counts_truths(self, framework: str) -> None:
        assert to_numpy(segment_sum(FRAMEWORKS[framework](self.x > 1), self.ids, 3)).tolist() == [2, 0, 2]

    weight = np.array([1.0, 10.0, 100.0])

    def test_gradient_in_torch(self) -> None:
        x = FRAMEWORKS["torch"](self.x).requires_grad_()
        (segment_sum(x, self.ids, 3) * FRAMEWORKS["torch"](self.weight)).sum().backward()
        np.testing.assert_array_equal(x.grad.numpy(), self.weight[self.ids])

    def test_gradient_in_jax(self) -> None:
        jax = pytest.importorskip("jax")
        gradient = jax.grad(lambda x: (segment_sum(x, self.ids, 3) * self.weight).sum())(jax.numpy.asarray(self.x))
        np.testing.assert_array_equal(np.asarray(gradient), self.weight[self.ids])

    @every_framework
    @pytest.mark.parametrize("ddof", [0, 1])
    @pytest.mark.parametrize("sizes", [(1,), (3, 1, 6, 2), (5, 5)])
    def test_statistics_equal_numpy_on_each_segment(self, framework: str, sizes: tuple[int, ...], ddof: int) -> None:
        rng = np.random.default_rng(sum(sizes))
        ids = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        x = rng.normal(3.0, 2.0, len(ids))
        n = len(sizes)
        with in_float64(framework):
            array = FRAMEWORKS[framework](x)
            mean, std = to_numpy(segment_mean(array, ids, n)), to_numpy(segment_std(array, ids, n, ddof))
            deviation = to_numpy(segment_deviation(array, ids, n))
        for i in range(n):
            own = x[ids == i]
            np.testing.assert_allclose(mean[i], own.mean(), rtol=1e-13)
            np.testing.assert_allclose(deviation[ids == i], own - own.mean(), atol=1e-13)
            np.testing.assert_allclose(std[i], own.std(ddof=ddof) if len(own) > 1 else 0.0, atol=1e-13)

    @every_framework
    def test_equal_numbers_deviate_by_exactly_nothing(self, framework: str) -> None:
        sizes = [*range(1, 12)]
        ids = np.repeat(np.arange(len(sizes)), sizes)
        x = 0.1 * np.arange(1, 12)[ids]
        array = FRAMEWORKS[framework](x)
        assert (to_numpy(array - segment_mean(array, ids, len(sizes))[ids]) != 0).any()  # the trap is there
        assert not to_numpy(segment_deviation(array, ids, len(sizes))).any()

    @every_framework
    def test_standard_deviation_far_from_zero(self, framework: str) -> None:
        x = np.array([1e6, 1e6 + 1, 1e6 + 2], np.float32)
        std = segment_std(FRAMEWORKS[framework](x), np.zeros(3, np.int64), 1, 1)
        np.testing.assert_allclose(to_numpy(std), [1.0], rtol=1e-5)

    @every_framework
    def test_whiten(self, framework: str) -> None:
        keep = np.array([True, False, True, True, True])
        own = self.x[keep]
        with in_float64(framework):
            white = to_numpy(whiten(FRAMEWORKS[framework](self.x), keep))
        np.testing.assert_allclose(white[keep], (own - own.mean()) / np.sqrt(own.var(ddof=1) + 1e-8), rtol=1e-12)
        assert white[1] == 0.0
        alone = np.array([False, False, True, False, False])
        np.testing.assert_array_equal(to_numpy(whiten(FRAMEWORKS[framework](self.x), alone)), [0, 0, 4, 0, 0])


class TestOps:
    @every_framework
    def test_sigmoids_without_overflow(self, framework: str) -> None:
        x = FRAMEWORKS[framework](np.array([-1000.0, -80.0, 0.0, 3.0, 1000.0], np.float32))
        ops = ops_of(x)
        np.testing.assert_allclose(to_numpy(ops.log_sigmoid(x)), [-1000, -80, -np.log(2), -np.log1p(np.exp(-3.0)), 0],
                                   rtol=1e-6)
        np.testing.assert_allclose(to_numpy(ops.sigmoid(x)), [0, np.exp(-80.0), 0.5, 1 / (1 + np.exp(-3.0)), 1],
                                   rtol=1e-6)

    @every_framework
    def test_one_object_per_framework(self, framework: str) -> None:
        x = FRAMEWORKS[framework](np.ones(2, np.float32))
        assert ops_of(x) is ops_of(x + 1)
        assert framework_of(x) == framework == framework_of(like(np.ones(2), x))

    def test_stop_gradient_in_torch(self) -> None:
        x = FRAMEWORKS["torch"](np.ones(1)).requires_grad_()
        assert not ops_of(x).stop_gradient(x).requires_grad

    def test_stop_gradient_in_jax(self) -> None:
        jax = pytest.importorskip("jax")
        gradient = jax.grad(lambda x: (x * ops_of(x).stop_gradient(x)).sum())(jax.numpy.full(1, 3.0))
        assert gradient.tolist() == [3.0]

    @pytest.mark.parametrize("other", [[1.0], 1.0, None, "x"])
    def test_refuses_what_is_no_array(self, other: object) -> None:
        with pytest.raises(TypeError, match="expected an array of NumPy, torch or JAX"):
            ops_of(other)


class TestSelectiveLogSoftmax:
    """Against p written out, one logit at a time."""

    z = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, -np.inf, 0.0, -np.inf], [80.0, 1e3, -1e3, 999.0], [-2.0, 5.0, 5.0, 5.0]])
    chosen = np.array([2, 0, 3, 1])

    def expected(self, temperature: float) -> tuple[list[float], list[float]]:
        logprobs, entropies = [], []
        for row, c in zip(self.z / temperature, self.chosen, strict=True):
            total = sum(np.exp(x - max(row)) for x in row)
            log_p = [x - max(row) - np.log(total) for x in row]
            logprobs.append(log_p[c])
            entropies.append(-sum(np.exp(x) * x for x in log_p if np.exp(x) > 0))
        return logprobs, entropies

    @every_framework
    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    @pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-12)])
    def test_equals_p_written_out(self, framework: str, temperature: float, dtype: str, tolerance: float) -> None:
        with in_float64(framework):
            z, chosen = FRAMEWORKS[framework](self.z.astype(dtype)), FRAMEWORKS[framework](self.chosen)
            got = selective_log_softmax(z, chosen, temperature)
            assert str(got.dtype).endswith(dtype)
        np.testing.assert_allclose(to_numpy(got), self.expected(temperature), rtol=tolerance, atol=tolerance)
        assert to_numpy(got)[0].max() <= 0

    @pytest.mark.parametrize("half", HALVES)
    def test_half_precision_is_computed_in_float32(self, half: str) -> None:
        chosen = FRAMEWORKS[half.split()[0]](self.chosen)
        got = selective_log_softmax(HALVES[half](self.z.astype(np.float32)), chosen)
        assert str(got.dtype).endswith("float32")
        np.testing.assert_allclose(to_numpy(got)[:, [0, 1, 3]], np.array(self.expected(1.0))[:, [0, 1, 3]], rtol=1e-6)

    def test_it_is_differentiable(self) -> None:
        torch = pytest.importorskip("torch")
        z = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 5))).requires_grad_()
        assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, torch.tensor([4, 0, 2]), 0.7), z)

    def test_a_logit_of_minus_infinity_has_no_gradient(self) -> None:
        torch = pytest.importorskip("torch")
        z = torch.from_numpy(self.z).requires_grad_()
        selective_log_softmax(z, torch.from_numpy(self.chosen)).sum().backward()
        assert z.grad.isfinite().all() and z.grad[1, [1, 3]].tolist() == [0.0, 0.0]

    def test_a_kernel_may_replace_it(self) -> None:
        before = selective_log_softmax(self.z, self.chosen)
        with use_kernels([Toy("selective_log_softmax")]):
            np.testing.assert_array_equal(selective_log_softmax(self.z, self.chosen), 10 * before)


@dataclass
class Toy:
    """Ten times the reference for whatever is at most `longest` long, so that its use shows."""

    op: str
    framework: str = "numpy"
    device: str = "cpu"
    longest: int = 100

    def supports(self, *args: Any) -> bool:
        return len(args[0]) <= self.longest

    def __call__(self, *args: Any) -> Any:
        with use_kernels([]):
            return 10 * getattr(ops_module, self.op)(*args)


class TestKernels:
    offsets = np.array([0, 2, 3])
    x = np.array([1.0, 2.0, 4.0])

    def test_replaces_an_op_in_its_block_alone(self) -> None:
        before = reverse_recurrence(0.5, self.x, self.offsets)
        with use_kernels([Toy("segment_sum"), Toy("reverse_recurrence")]):
            np.testing.assert_array_equal(reverse_recurrence(0.5, self.x, self.offsets), 10 * before)
            assert ops_of(self.x).segment_sum(self.x, np.array([0, 0, 1]), 2).tolist() == [30.0, 40.0]
        np.testing.assert_array_equal(reverse_recurrence(0.5, self.x, self.offsets), before)

    def test_leaves_the_block_behind_after_an_error(self) -> None:
        with pytest.raises(RuntimeError), use_kernels([Toy("reverse_recurrence")]):
            raise RuntimeError
        np.testing.assert_array_equal(reverse_recurrence(0.0, self.x, self.offsets), self.x)

    @pytest.mark.parametrize("other", [
        Toy("segment_sum"), Toy("reverse_recurrence", framework="torch"), Toy("reverse_recurrence", device="cuda"),
        Toy("reverse_recurrence", longest=2)])
    def test_is_passed_over_where_it_does_not_fit(self, other: Toy) -> None:
        with use_kernels([other]):
            np.testing.assert_array_equal(reverse_recurrence(0.0, self.x, self.offsets), self.x)

    def test_the_first_that_fits_is_taken(self) -> None:
        with use_kernels([Toy("reverse_recurrence", longest=2), Toy("reverse_recurrence")]):
            np.testing.assert_array_equal(reverse_recurrence(0.0, self.x, self.offsets), 10 * self.x)

    @pytest.mark.parametrize("framework", ["torch", "jax"])
    def test_knows_the_device_of_other_frameworks(self, framework: str) -> None:
        x = FRAMEWORKS[framework](self.x.astype(np.float32))
        with use_kernels([Toy("reverse_recurrence", framework=framework)]):
            np.testing.assert_array_equal(to_numpy(reverse_recurrence(0.0, x, self.offsets)), 10 * self.x)

    def test_receives_columns_of_one_dtype(self) -> None:
        seen: list[Any] = []

        class Spy(Toy):
            def __call__(self, *args: Any) -> Any:
                seen.extend(args)
                return args[1]

        with use_kernels([Spy("reverse_recurrence")]):
            reverse_recurrence(0.5, self.x.astype(np.float32), self.offsets)
            reverse_recurrence(np.full(3, 0.5), self.x.astype(np.float32), self.offsets)
        assert [a.dtype for a in (seen[0], seen[1], seen[3], seen[4])] == [np.float32] * 2 + [np.float64] * 2
        np.testing.assert_array_equal(seen[0], [0.5] * 3)
        np.testing.assert_array_equal(seen[2], self.offsets)

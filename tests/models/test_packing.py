"""A packed stream against one laid out by a Python loop."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import example, given, settings

from models.packing import pack


def slow_pack(starts: list[int], lengths: list[int]) -> list[tuple[int, int, int]]:
    """(index, segment, offset) of every used slot."""
    return [
        (start + t, b, t)
        for b, (start, length) in enumerate(zip(starts, lengths, strict=True))
        for t in range(length)
    ]


# Few distinct shapes, as each one compiles anew.
@st.composite
def cases(draw):
    size = draw(st.sampled_from([1, 4]))
    lengths = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    starts = draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
    return starts, lengths


@settings(deadline=None, max_examples=50)
@given(cases())
@example(([7, 0, 50, 9], [3, 3, 3, 3]))  # fits exactly
@example(([7, 0, 50, 9], [0, 0, 2, 1]))  # empty ones first
@example(([7, 0, 50, 9], [2, 0, 0, 1]))  # in the middle
@example(([7, 0, 50, 9], [1, 2, 0, 0]))  # last
@example(([7, 0, 50, 9], [0, 0, 0, 0]))
def test_pack_equals_the_loop(case):
    starts, lengths = case
    num_slots, max_length = 12, 3
    stream = pack(starts, lengths, num_slots)
    used = slow_pack(starts, lengths)

    np.testing.assert_array_equal(stream.used, np.arange(num_slots) < len(used))
    slots = np.stack([stream.index, stream.segment, stream.offset], axis=1)
    np.testing.assert_array_equal(slots[: len(used)], np.array(used).reshape(-1, 3))
    np.testing.assert_array_equal(slots[len(used) :, 1], len(lengths))
    np.testing.assert_array_equal(slots[len(used) :, 2], 0)
    np.testing.assert_array_equal(stream.lengths, lengths)
    padding = [max_length - lengths[b] for _, b, _ in used]
    padding += [max_length] * (num_slots - len(used))
    np.testing.assert_array_equal(stream.num_padding(max_length), padding)

    # The newest item of each sequence that has one; an empty sequence may point anywhere.
    last = {b: slot for slot, (_, b, _) in enumerate(used)}
    for b, slot in last.items():
        assert stream.last[b] == slot
    assert np.all(np.asarray(stream.last) >= 0)


def test_what_does_not_fit_is_cut_at_the_end():
    """Compiled code cannot report it, so the cut must at least leave the rest right."""
    stream = jax.jit(pack, static_argnums=2)([10, 20, 30], [2, 3, 4], 4)
    np.testing.assert_array_equal(stream.index, [10, 11, 20, 21])
    np.testing.assert_array_equal(stream.segment, [0, 0, 1, 1])


@pytest.mark.parametrize(
    ("starts", "lengths", "error", "message"),
    [
        ([0, 1, 2], [1, 2], ValueError, r"one shape \[B\], got \(3,\) and \(2,\)"),
        ([[0]], [[1]], ValueError, r"one shape \[B\], got \(1, 1\)"),
        ([0], [1.7], TypeError, "`lengths` must be integers, got float32"),
    ],
)
def test_bad_input(starts, lengths, error, message):
    with pytest.raises(error, match=message):
        pack(np.array(starts), np.array(lengths), 5)


def test_no_sequences():
    assert not pack(np.zeros(0), np.zeros(0), 3).used.any()


def test_all_fields_are_int32():
    """As declared, also where NumPy hands in 64-bit integers and JAX would keep them."""
    with jax.enable_x64(True):
        stream = pack(np.array([0, 4]), np.array([4, 1]), 6)
        assert {field.dtype for field in stream} == {np.dtype("int32")}

"""The checksum of the migration's stream."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from pyvhostvdpa._cdefs import ffi, lib

MASK = (1 << 64) - 1
ODD, ODD_2 = 0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93


def stream_sum(data: bytes) -> int:
    return int(lib.stream_sum(ffi.from_buffer("uint8_t[]", data), len(data)))


def scramble(v: int) -> int:
    v ^= v >> 32
    v = v * ODD_2 & MASK
    v ^= v >> 29
    v = v * ODD_2 & MASK
    return v ^ v >> 32


def as_documented(data: bytes) -> int:
    lanes = [ODD * (i + 1) & MASK for i in range(8)]
    padded = data + bytes(-len(data) % 64)
    for at in range(0, len(padded), 8):
        lane = lanes[at // 8 % 8] ^ int.from_bytes(padded[at : at + 8], "little")
        lanes[at // 8 % 8] = (lane << 29 | lane >> 35) * ODD & MASK
    total = len(data)
    for lane in lanes:
        total = scramble(total ^ lane)
    return total


@given(st.binary(max_size=700))
def test_stream_sum_equals_an_independent_implementation(data: bytes) -> None:
    assert stream_sum(data) == as_documented(data)


@given(st.binary(min_size=1, max_size=700), st.data())
def test_stream_sum_always_notices_one_changed_word(data: bytes, choose: st.DataObject) -> None:
    at = choose.draw(st.integers(0, (len(data) - 1) // 8)) * 8
    word = bytes(choose.draw(st.binary(min_size=len(data[at : at + 8]), max_size=len(data[at : at + 8]))))
    changed = data[:at] + word + data[at + 8 :]
    assert (stream_sum(changed) == stream_sum(data)) == (changed == data)


def test_every_pair_of_flipped_bits_in_two_blocks_is_noticed() -> None:
    data = bytes(range(128))
    sums = {stream_sum(data)}
    flips = [(1 << i) for i in range(0, 1024, 7)]
    number = int.from_bytes(data, "little")
    pairs = [(a, b) for k, a in enumerate(flips) for b in flips[k:]]
    for a, b in pairs:
        sums.add(stream_sum((number ^ (a | b)).to_bytes(128, "little")))
    assert len(sums) == len(pairs) + 1


def test_length_and_order_count() -> None:
    assert len({stream_sum(bytes(n)) for n in range(300)}) == 300
    assert stream_sum(b"a" * 64 + b"b" * 64) != stream_sum(b"b" * 64 + b"a" * 64)


@given(
    st.lists(st.tuples(st.sampled_from(["words", "copy", "blocks"]), st.integers(0, 5)), max_size=8),
    st.integers(0, 1 << 30),
)
def test_a_sum_of_parts_is_that_of_the_whole(parts: list[tuple[str, int]], seed: int) -> None:
    random, whole = Random(seed), b""
    running = ffi.new("struct running_sum *")
    lib.sum_begin(running)
    for how, size in parts:
        part = random.randbytes(size * (8 if how == "words" else 64))
        copy, words = ffi.new("uint8_t[]", len(part)), ffi.new("uint64_t[]", len(part) // 8)
        source = ffi.cast("uint8_t *", words)
        ffi.memmove(source, part, len(part))
        if how == "words":
            lib.sum_words(running, source, len(part))
        elif how == "copy":
            lib.sum_copy(running, copy, source, len(part))
            assert bytes(copy) == part
        else:
            lib.sum_blocks(running, source, len(part))
        whole += part
    assert lib.sum_end(running) == stream_sum(whole)

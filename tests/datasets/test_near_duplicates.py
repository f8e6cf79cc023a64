import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from clincot.datasets.near_duplicates import MAX_DISTANCE_BITS, NearPair, find_near_pairs, hash_image, hash_image_file
from clincot.images import InvalidImage

REAL = Path(__file__).parents[3] / "shared" / "data" / "vqa-rad"


def film(seed: int, side: int = 128) -> Image.Image:
    """A smooth picture: noise of 8 x 8, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def test_a_hash_by_hand() -> None:
    """A half-bright image, v(x) = 1 for x >= 16 of 32. Along y it is constant, so only the first row of the DCT
    is not 0: its coefficient k is -sum over the right half of cos(pi (2x + 1) k / 64) up to scale, an alternating
    series that is 0 for even k > 0 and has the sign of -sin(pi k / 2) mirrored: k = 1: -, 3: +, 5: -, 7: +.
    The median of the 63 is 0, so bits 3 and 7 are 1: 0b00010001 in the first of eight bytes."""
    pixels = np.zeros((32, 32), dtype=np.uint8)
    pixels[:, 16:] = 255
    cosines = [sum(np.cos(np.pi * (2 * x + 1) * k / 64) for x in range(16, 32)) for k in range(1, 8)]
    assert [round(c, 9) > 0 for c in cosines] == [False, False, True, False, False, False, True]
    assert hash_image(Image.fromarray(pixels)) == 0b00010001 << 56


def test_an_image_of_one_colour_has_hash_0() -> None:
    assert {hash_image(Image.new("L", (40, 30), shade)) for shade in (0, 90, 255)} == {0}


def test_copies_of_a_picture_are_near_and_other_pictures_are_not() -> None:
    one = film(1)
    buffer = io.BytesIO()
    one.save(buffer, "JPEG", quality=50)
    same = [
        Image.open(buffer),
        one.resize((64, 64)),
        one.convert("RGB"),
        ImageEnhance.Brightness(one).enhance(0.8),
        ImageEnhance.Contrast(one).enhance(0.8),
    ]
    assert max((hash_image(one) ^ hash_image(other)).bit_count() for other in same) <= MAX_DISTANCE_BITS
    others = [hash_image(film(seed)) for seed in range(2, 40)]
    assert not list(find_near_pairs([hash_image(one)], others))
    assert not list(find_near_pairs([hash_image(one)], [hash_image(one.transpose(Image.Transpose.FLIP_LEFT_RIGHT))]))


def test_file_hash_is_of_the_image_as_models_see_it(tmp_path: Path) -> None:
    wide = film(3).resize((160, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.convert("RGB").save(tmp_path / "lying.png", exif=exif)
    assert hash_image_file(tmp_path / "lying.png") == hash_image(wide.transpose(Image.Transpose.ROTATE_270))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(InvalidImage, match=r"bad\.png"):
        hash_image_file(tmp_path / "bad.png")


def test_pairs_of_two_lists_and_of_one() -> None:
    # 0b0111 is 3 bits from 0, 1 from 0b0011; the highest bit is a bit like any other
    assert list(find_near_pairs([0, 0b0011], [0b0111, 1 << 63], within=1)) == [NearPair(0, 1, 1), NearPair(1, 0, 1)]
    assert list(find_near_pairs([5, 5, 4], within=0)) == [NearPair(0, 1, 0)]
    assert list(find_near_pairs([5, 5, 4], within=1)) == [NearPair(0, 1, 0), NearPair(0, 2, 1), NearPair(1, 2, 1)]
    assert list(find_near_pairs([], [1])) == list(find_near_pairs([1], [])) == list(find_near_pairs([])) == []
    with pytest.raises(ValueError, match=r"in \[0, 64\], got 65"):
        list(find_near_pairs([1], within=65))


def test_blocks_of_ten_thousand_miss_no_pair() -> None:
    rng = np.random.default_rng(0)
    hashes = [int(v) for v in rng.integers(0, 2**64, 10_000, dtype=np.uint64)]
    planted = {(10, 9_990), (4_999, 5_000), (0, 9_999)}  # within a block, across blocks, at both ends
    for a, b in planted:
        hashes[b] = hashes[a] ^ 0b10101
    # By chance 64 random bits are within 6 of another's with probability 5e-12 (83 million / 2^64), a pair of 5e7
    assert {(pair.first, pair.second) for pair in find_near_pairs(hashes)} == planted


@pytest.mark.skipif(not REAL.is_dir(), reason=f"VQA-RAD is not at {REAL}")
def test_different_films_of_vqa_rad_are_apart() -> None:
    hashes = [hash_image_file(path) for path in sorted(REAL.glob("*/*.jpg"))[:100]]
    assert len(set(hashes)) > 90
    assert not list(find_near_pairs(hashes))


@pytest.mark.parametrize("within", [0, 3, 6, 9, 13])
def test_groups_find_the_same_pairs_as_comparing_all(within: int) -> None:
    """Hashes that are copies of a few, with up to 16 bits changed, so that every distance occurs."""
    rng = np.random.default_rng(within)
    seeds = rng.integers(0, 2**64, 20, dtype=np.uint64)
    hashes = []
    for number in range(600):
        changed = rng.choice(64, rng.integers(0, 9), replace=False)
        hashes.append(int(seeds[number % 20]) ^ sum(1 << int(bit) for bit in changed))
    first, second = hashes[:250], hashes[250:]

    def compare_all(one: list[int], other: list[int]) -> list[NearPair]:
        apart = ((a, b, (x ^ y).bit_count()) for a, x in enumerate(one) for b, y in enumerate(other))
        return [NearPair(*found) for found in apart if found[2] <= within]

    expected = compare_all(first, second)
    assert expected
    assert list(find_near_pairs(first, second, within=within)) == expected
    assert list(find_near_pairs(hashes, within=within)) == [
        pair for pair in compare_all(hashes, hashes) if pair.first < pair.second
    ]


def test_many_equal_hashes_are_compared_in_parts() -> None:
    """2,000 blank pictures against as many make 4 million pairs, which are found a part at a time."""
    found = find_near_pairs([0] * 2_000, [0] * 2_000)
    assert [next(found) for _ in range(3)] == [NearPair(0, 0, 0), NearPair(0, 1, 0), NearPair(0, 2, 0)]
    assert sum(1 for _ in found) == 4_000_000 - 3

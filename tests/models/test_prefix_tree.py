"""Trees of conversations whose common beginnings occur once."""

from __future__ import annotations

import numpy as np

from clincot.models.encoding import EncodedConversation
from clincot.models.prefix_tree import PrefixTree, build_keys, build_trees
from clincot.prompts import ImageView

FILM, LEFT, RIGHT = (ImageView(f"{name}.png", name) for name in ("film", "left", "right"))
IMAGE = 7  # the id of an image token


def encode(ids: list[int], *pictures: tuple[ImageView, int]) -> EncodedConversation:
    """A conversation of these ids, with pictures of so many image tokens."""
    shown, tokens = zip(*pictures, strict=True) if pictures else ((), ())
    return EncodedConversation(tuple(ids), (False,) * len(ids), tuple(shown), picture_tokens=tuple(tokens))


def read_path(tree: PrefixTree, member: int, encoded: list[EncodedConversation]) -> list[int]:
    """The ids along a member's path."""
    path = tree.paths[member]
    return [encoded[tree.owners[i]].ids[tree.depths[i]] for i in path]


def list_visible(tree: PrefixTree, token: int) -> list[int]:
    """The tokens that a token sees: those before it and itself whose interval it is in."""
    return [other for other in range(token + 1) if token < tree.ends[other]]


def test_common_beginnings_occur_once() -> None:
    """1 2 3, 1 2 4 5 and 1 2 4 6: the words 1 2 once, 4 once for two of them; 6 tokens instead of 11."""
    encoded = [encode([1, 2, 3]), encode([1, 2, 4, 5]), encode([1, 2, 4, 6])]
    (tree,) = build_trees(build_keys(encoded, frozenset({IMAGE})), max_tokens=100)
    assert len(tree) == 6
    assert tree.members == (0, 1, 2)
    for member, index in enumerate(tree.members):
        assert tuple(read_path(tree, member, encoded)) == encoded[index].ids
        assert [tree.depths[i] for i in tree.paths[member]] == list(range(len(encoded[index].ids)))


def test_a_token_sees_its_own_conversation_only() -> None:
    encoded = [encode([1, 2, 3]), encode([1, 2, 4, 5]), encode([1, 2, 4, 6]), encode([1, 2])]
    (tree,) = build_trees(build_keys(encoded, frozenset({IMAGE})), max_tokens=100)
    for path in tree.paths:
        assert list_visible(tree, int(path[-1])) == path.tolist()


def test_equal_conversations_are_computed_once() -> None:
    encoded = [encode([1, 2, 3])] * 3
    (tree,) = build_trees(build_keys(encoded, frozenset({IMAGE})), max_tokens=100)
    assert len(tree) == 3
    assert [path.tolist() for path in tree.paths] == [[0, 1, 2]] * 3


def test_two_pictures_are_different_tokens() -> None:
    """Two crops have the same ids, so the beginning that counts ends before the first that differs: 1 7 7 2 is common,
    7 7 3 is not: 4 + 2 * 3 tokens."""
    ids = [1, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3]
    encoded = [encode(ids, (FILM, 2), (LEFT, 2)), encode(ids, (FILM, 2), (RIGHT, 2))]
    (tree,) = build_trees(build_keys(encoded, frozenset({IMAGE})), max_tokens=100)
    assert len(tree) == 4 + 2 * 3
    same = [encode(ids, (FILM, 2), (LEFT, 2))] * 2
    assert len(build_trees(build_keys(same, frozenset({IMAGE})), max_tokens=100)[0]) == 7


def test_a_picture_by_itself_is_another_than_among_others() -> None:
    """LLaVA-OneVision tiles a picture only if it is the only one, so its features differ."""
    alone, beside = encode([IMAGE, 1], (FILM, 1)), encode([IMAGE, 1, IMAGE], (FILM, 1), (LEFT, 1))
    assert sum(map(len, build_trees(build_keys([alone, beside], frozenset({IMAGE})), max_tokens=100))) == 2 + 3


def test_strangers_do_not_share_a_tree() -> None:
    """One common token of eight is less than a quarter: computing it twice is cheaper than one mask for both."""
    encoded = [encode([1, *range(10, 17)]), encode([1, *range(20, 27)])]
    keys = build_keys(encoded, frozenset({IMAGE}))
    assert [len(tree) for tree in build_trees(keys, max_tokens=100)] == [8, 8]
    near = [encode([1, 2, *range(10, 16)]), encode([1, 2, *range(20, 26)])]  # 2 of 8 are a quarter
    assert [len(tree) for tree in build_trees(build_keys(near, frozenset({IMAGE})), max_tokens=100)] == [14]


def test_a_tree_has_a_limit_and_a_longer_conversation_one_of_its_own() -> None:
    """5 common tokens and one of its own each: 5 + 3 tokens fit 8, so 4 conversations need two trees."""
    encoded = [encode([1, 2, 3, 4, 5, last]) for last in (6, 8, 9, 10)]
    keys = build_keys(encoded, frozenset({IMAGE}))
    assert [len(tree) for tree in build_trees(keys, max_tokens=8)] == [8, 6]
    assert [len(tree) for tree in build_trees(keys, max_tokens=3)] == [6] * 4


def test_every_conversation_is_in_one_tree() -> None:
    draws = np.random.default_rng(0)
    encoded = [encode(draws.integers(0, 3, size=draws.integers(1, 12)).tolist()) for _ in range(200)]
    trees = build_trees(build_keys(encoded, frozenset({IMAGE})), max_tokens=40)
    members: list[int] = []
    for tree in trees:
        members += tree.members
        for member, index in enumerate(tree.members):
            assert tuple(read_path(tree, member, encoded)) == encoded[index].ids
            assert list_visible(tree, int(tree.paths[member][-1])) == tree.paths[member].tolist()
    assert sorted(members) == list(range(200))

"""Versions of a round's preference data: DVC stores the files, git their digests, and a tag names the round."""

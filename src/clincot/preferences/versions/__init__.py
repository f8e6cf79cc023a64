"""Versions of a round's preference data: DVC stores the files, git their hashes, a tag names the round."""

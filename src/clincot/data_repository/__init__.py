"""A round's preference data as a version: DVC holds the files, git their names; a tag says of which round they are."""

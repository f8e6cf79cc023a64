"""The small models that come with the package, their calibration and seven golden films (data files only)."""

"""From candidate answers to scores (panel, calibration) and from scores to preference pairs."""

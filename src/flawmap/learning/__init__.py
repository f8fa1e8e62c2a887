"""From paths of good images to a fitted and calibrated method."""

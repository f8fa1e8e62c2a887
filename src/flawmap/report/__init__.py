"""What people look at: heatmaps over the original pixels."""

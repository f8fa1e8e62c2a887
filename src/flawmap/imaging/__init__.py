"""From image files to the inputs of a model, and maps back onto the pixels. Needs numpy and Pillow only."""

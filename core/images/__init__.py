"""Labelled images as every domain of images needs them: where they come from, how they are seen."""

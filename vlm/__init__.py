"""Image-text models: CLIP and its kin, adapted with few images per class."""

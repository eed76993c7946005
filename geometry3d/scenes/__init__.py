"""Generated scenes: images with exact depth, pose and focal, a pure function of kind and seed."""

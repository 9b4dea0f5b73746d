"""The inputs of a study: networks, their weights, images, and the published presets."""

"""What a study starts from: networks, their weights, images, and the published presets."""

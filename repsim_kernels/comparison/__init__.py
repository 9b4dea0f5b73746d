"""From two networks to a picture: similarity maps, how they are made, drawn and saved."""

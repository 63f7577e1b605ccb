"""From a config to a trained adapter: run -> loop -> step."""

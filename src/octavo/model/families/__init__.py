"""Model families, one small file each: convert a config.json to a DecoderSpec, and name the weights."""

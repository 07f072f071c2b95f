"""Model families, one small file each: reading a config.json into a DecoderSpec, and the names of the weights."""

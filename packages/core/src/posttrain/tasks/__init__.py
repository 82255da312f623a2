"""Where prompts come from. Names are registered in `posttrain.plugin`."""

"""GPU kernels: faster forms of the operations of `posttrain.ops`, each a component. Listing them imports no Triton."""

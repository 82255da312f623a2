"""What runs on JAX: imported by the components when a model is loaded, never before."""

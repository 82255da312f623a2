"""What is to be maximised: rules, and the scoring of rollouts. Names are registered in `posttrain.plugin`."""

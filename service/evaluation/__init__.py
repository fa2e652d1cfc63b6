"""The Megatron-LM paper's evaluations, by its own protocols, on the service's scoring."""

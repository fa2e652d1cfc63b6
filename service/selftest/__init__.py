"""`megatron-gpt2 selftest`: whether requests get the same bits alone and in company, on this machine."""

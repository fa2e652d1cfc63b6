"""megatron-gpt2: MegatronGPT2 345M and its GPT-2 relatives, served over HTTP."""

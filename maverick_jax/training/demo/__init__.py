"""The whole of post-training on the embedded mini model: filter, SFT, RL and DPO, each beside a control that differs in one thing."""

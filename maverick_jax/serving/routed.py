"""Which experts computed an answer, in vLLM's form: for trainers that send the same tokens to the same experts.

Source: vLLM's `routed_experts`, bytes of numpy's `.npy` in base64: [T, L, 1] unsigned, over the tokens of prompt and answer but the
last one, which nobody computes, all layers, and the experts per token. Layers without experts have 0.

Shape suffixes: T tokens, M layers with experts, L layers.
"""

from __future__ import annotations

import base64
import io

import numpy as np

from maverick_jax.serving.reply import Reply


def routed_experts(reply: Reply, index: int) -> dict[str, str]:
    """The field of an answer that has ended, if it is told."""
    answer, request, config = reply.answers[index], reply.prepared.requests[index], reply.prepared.config.text
    if request.routed_experts_prompt_start is None:
        return {}
    expert_TM = answer.handle.routed_experts
    if answer.stop_text is not None:  # the engine went on to there, and maybe further
        expert_TM = expert_TM[: len(request.ids) + len(answer.tokens) - 1 - request.routed_experts_prompt_start]
    expert_TL1 = np.zeros((len(expert_TM), config.num_hidden_layers, 1), expert_TM.dtype)
    expert_TL1[:, list(config.moe_layers), 0] = expert_TM
    stream = io.BytesIO()
    np.save(stream, expert_TL1)
    return {"routed_experts": base64.b64encode(stream.getvalue()).decode()}

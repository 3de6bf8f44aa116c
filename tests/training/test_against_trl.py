"""The same numbers cost the same in TRL: its DPO and GRPO trainers' losses on log-probabilities of ours.

TRL is no dependency: `pip install trl` beside the extras `test` and `torch`, and these tests run.
"""

from collections import defaultdict
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_policy import drawn_by
from test_preference import pairs_of

from maverick_jax.training.policy import Policy
from maverick_jax.training.preference import Preference
from oracle.answers import likely
from oracle.plain import plain_model

torch = pytest.importorskip("torch", reason="torch is not installed: pip install '.[torch]'")
pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
pytestmark = pytest.mark.filterwarnings("ignore")


class Alone:
    """One process of accelerate's."""

    device = torch.device("cpu")
    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x


def tensor(x):
    return torch.tensor(np.array(x, np.float64))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo(smoothing):
    """TRL's loss of pairs, without and with label smoothing (its `robust` divides by 1 - 2 e and takes the other side off: undone here)."""
    from trl import DPOTrainer

    model, pairs = plain_model(), pairs_of()
    weight = pairs.batch.weight_BT
    lost, _ = jax.jit(lambda pairs: Preference(0.3, smoothing)(model, pairs))(pairs)
    order = [0, 2, 4, 1, 3, 5]  # TRL has all chosen ones first
    logprobs, mask = tensor(likely(model, pairs.batch) * weight)[order], tensor(weight).long()[order]
    reference = tensor(pairs.reference_B)[order]
    zeros = torch.zeros_like(logprobs)  # of what is only reported
    outputs = SimpleNamespace(log_probs=logprobs, entropy=zeros, mean_logits=zeros, is_top1=zeros > 0)

    def loss(kind):
        trainer = SimpleNamespace(
            model=SimpleNamespace(training=False),
            accelerator=Alone(),
            aux_loss_enabled=False,
            ld_alpha=None,
            precompute_ref_logps=True,
            f_divergence_type="reverse_kl",
            loss_types=[kind],
            loss_weights=[1.0],
            beta=0.3,
            label_smoothing=smoothing,
            use_weighting=False,
            _metrics=defaultdict(lambda: defaultdict(list)),
            _total_train_tokens=0,
            _tp_size=1,
        )
        before = torch.zeros(len(mask), 1, dtype=torch.long)
        inputs = {
            "input_ids": torch.cat([before, torch.zeros_like(mask)], dim=1),
            "attention_mask": torch.ones(len(mask), mask.shape[1] + 1),
            "completion_mask": torch.cat([before, mask], dim=1),
            "ref_chosen_logps": reference[:3],
            "ref_rejected_logps": reference[3:],
        }
        return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False).item()

    expected = loss("sigmoid")
    if smoothing:
        robust = loss("robust") * (1 - 2 * smoothing)
        flipped = ((1 - smoothing) * expected - robust) / smoothing
        expected = (1 - smoothing) * expected + smoothing * flipped
    np.testing.assert_allclose(float(lost) / 3, expected, rtol=1e-5)


@pytest.mark.parametrize("kl", [0.0, 0.2])
def test_grpo(kl):
    """TRL's loss of answers, mean of all tokens, ratios to the sampler's probabilities."""
    from trl import GRPOTrainer

    model = plain_model()
    drawn = drawn_by(model)
    weight = drawn.batch.weight_BT
    lost, measures = jax.jit(lambda drawn: Policy(0.2, 0.28, kl)(model, drawn))(drawn)
    logprobs, mask = tensor(likely(model, drawn.batch)), tensor(weight)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=Alone(),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=kl,
        loss_type="bnpo",
        epsilon_low=0.2,
        epsilon_high=0.28,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.zeros(4, 12, dtype=torch.long),
        "completion_mask": mask,
        "advantages": tensor(drawn.advantage_BT[:, 0]),
        "old_per_token_logps": tensor(drawn.sampled_BT),
        "ref_per_token_logps": tensor(drawn.reference_BT),
    }
    expected = GRPOTrainer._compute_loss(trainer, None, inputs).item()
    np.testing.assert_allclose(float(lost) / weight.sum(), expected, rtol=1e-5)
    if kl:
        np.testing.assert_allclose(float(measures["kl"]) / weight.sum(), trainer._metrics["eval"]["kl"][0], rtol=1e-5)


def test_advantages_are_trls():
    """Reward less mean, over the deviation of the group's sample: as TRL's `nanstd`."""
    from trl.trainer.utils import nanstd

    rewards = np.random.default_rng(0).random((3, 4))
    expected = nanstd(tensor(rewards), dim=1).numpy()
    np.testing.assert_allclose(rewards.std(axis=1, ddof=1), expected, rtol=1e-6)

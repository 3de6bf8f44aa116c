"""What a plan says beside its numbers, and its Python face."""

from maverick_jax.plan import make_plan


def test_notes(maverick_config):
    """Rows that no device shares, memory that jax does not take by itself: each is said."""
    tight = make_plan(maverick_config, topology="h100:8", dtype="fp8", mesh={"expert": 2, "tensor": 4}, batch=63)
    assert [note.split(":")[0] for note in tight.notes] == [
        "batch 63 is no multiple of 2",
        "jax takes 75 % of a GPU's memory by default",
    ]
    assert make_plan(maverick_config, topology="v6e:8x8", mesh={"expert": 8, "tensor": 8}).notes == []


def test_a_plan_prints_itself(maverick_config):
    plan = make_plan(maverick_config, topology="v6e:8x8", mesh={"expert": 8, "tensor": 8})
    assert str(plan).startswith("401.6 B parameters, 803.17 GB in bfloat16; batch 64, context 8,192\n")
    assert plan.as_dict()["memory_per_device"]["needed"] == plan.memory.needed
    assert [batch for batch, _ in plan.curve] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, plan.largest_batch]


def test_a_plan_of_what_does_not_fit(maverick_config):
    """Python gets a plan to look at, and the line that the command would have printed."""
    plan = make_plan(maverick_config, topology="h100:8", mesh={"tensor": 8})
    assert not plan.fits
    assert plan.refusal.startswith("does not fit h100:8 with mesh tensor=8")
    assert "it does not fit" in str(plan)

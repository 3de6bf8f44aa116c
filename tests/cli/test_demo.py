"""The demonstration shows what it promises, in order, and fails when the answer is wrong."""

from maverick_jax.assets import digits

ORDER = [
    "versions", "jax ", "a PyTorch checkpoint becomes an Orbax one", "params/", "every parameter on its devices", "'expert': 8", "device 7",
    "two pictures", "█", "a question about them", "answer    ", "expected  ", "tokens per expert", "dropped = 0", "tokens/s",
]  # fmt: skip


def test_demo_twice(maverick, tmp_path):
    """Everything in the promised order; a second run replaces what the first made; then the README's next command."""
    for _ in range(2):
        result = maverick("demo", "--out", tmp_path / "demo")
        assert result.status == 0
        at = -1
        for word in ORDER:
            assert word in result.out[at + 1 :], word
            at = result.out.index(word, at + 1)
        lines = result.out.splitlines()
        answer, expected = (next(line for line in lines if line.startswith(word)) for word in ("answer ", "expected "))
        assert answer.split(maxsplit=1)[1] == expected.split(maxsplit=1)[1]
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"mini-maverick", "left.png", "right.png"}
    question = next(line for line in lines if line.startswith("question ")).split(maxsplit=1)[1]
    pictures = [word for name in ("left.png", "right.png") for word in ("--image", tmp_path / "demo" / name)]
    assert maverick("generate", question, *pictures).out.strip() == expected.split(maxsplit=1)[1]


def test_a_wrong_answer_is_a_failure(maverick, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "answer", lambda question, left, right: "something else")
    result = maverick("demo", "--out", tmp_path / "demo")
    assert result.status == 1
    assert "the answer is wrong" in result.err

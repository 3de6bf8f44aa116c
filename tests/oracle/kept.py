"""Which tokens the filters keep, in float64 and by their definitions: what the quick ways are compared with."""

import numpy as np

NEAR = 1e-5  # float32: of tokens whose place is so close to the border of top-p either side is right


def kept(logits: np.ndarray, *, temperature=1.0, top_k=None, top_p=None, min_p=None) -> tuple[list[int], list[int]]:
    """The ids that must be kept, and those that may be, each in their order."""
    order = np.argsort(-logits, kind="stable")[: top_k or len(logits)]
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    before = (np.cumsum(p) - p) / p.sum()
    must, may = (order[(before < (top_p or 2.0) + by) & (p >= (min_p or 0.0) * (1 - by))].tolist() for by in (-NEAR, NEAR))
    return must or may[:1], may


def probabilities(logits: np.ndarray, **settings) -> np.ndarray:
    """[V] float64: of what is left, the tokens at the border included."""
    p = np.zeros(len(logits))
    _, left = kept(logits, **settings)
    scaled = logits[left].astype(np.float64) / settings.get("temperature", 1.0)
    p[left] = np.exp(scaled - scaled.max())
    return p / p.sum()

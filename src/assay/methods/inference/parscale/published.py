"""The paper's measurements and models, as numbers: 24 losses on each of two corpora, and the shapes they were measured with.

Losses and parameter counts: `parametric_fit.py` of github.com/QwenLM/ParScale (arXiv 2505.10475). The sizes of the six shapes follow from
the counts (each has one solution) and the fields of the released Qwen2 configurations (36 layers, 16 heads, 2 of keys and values, 48
prefix tokens); the tests count them with real modules.
"""

from __future__ import annotations

STREAMS = (1, 2, 4, 8)

# (hidden_size, intermediate_size) of the six models; layers, heads and vocabulary are the same in all
WIDTHS = ((896, 4864), (1024, 5504), (1280, 6912), (1536, 8320), (2048, 11008), (2560, 13824))
COMMON = {
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
PREFIX_TOKENS = 48

# parameters without the embedding: a row for each number of streams, a column for each shape
PARAMETERS = (
    (535813376, 693753856, 1088376320, 1571472384, 2774773760, 4353203200),
    (538195842, 696738818, 1092762882, 1577522690, 2784937986, 4368529922),
    (540577412, 699722756, 1097148164, 1583571460, 2795100164, 4383854084),
    (545340552, 705690632, 1105918728, 1595669000, 2815424520, 4414502408),
)

# nats a token at the end of training, the same rows and columns
LOSSES = {
    "stack": (
        (1.1722, 1.1496, 1.1131, 1.0817, 1.0451, 1.0213),
        (1.1507, 1.1262, 1.0940, 1.0623, 1.0244, 1.0025),
        (1.1354, 1.1124, 1.0808, 1.0490, 1.0126, 0.9906),
        (1.1231, 1.0997, 1.0688, 1.0383, 1.0016, 0.9794),
    ),
    "pile": (
        (2.1113, 2.0671, 2.0027, 1.9539, 1.8876, 1.8451),
        (2.0772, 2.0363, 1.9730, 1.9266, 1.8610, 1.8137),
        (2.0544, 2.0128, 1.9509, 1.9040, 1.8394, 1.7938),
        (2.0364, 1.9933, 1.9318, 1.8856, 1.8218, 1.7772),
    ),
}

# what the paper reports of its own fits
REPORTED = {"stack": {"k": 0.39, "r2": 0.998}, "pile": {"k": 0.33, "r2": 0.998}}


def table(corpus: str) -> tuple[list[tuple[float, float]], list[float]]:
    """(parameters, streams) of the 24 models and their losses on "stack" (Stack-V2 Python) or "pile". Raises ValueError for another.

    >>> inputs, losses = table("pile")
    >>> inputs[0], losses[0], len(losses)
    ((535813376.0, 1.0), 2.1113, 24)
    """
    if corpus not in LOSSES:
        raise ValueError(f"corpus must be one of {', '.join(LOSSES)}, got {corpus!r}")
    inputs, losses = [], []
    for row, streams in enumerate(STREAMS):
        for column in range(len(WIDTHS)):
            inputs.append((float(PARAMETERS[row][column]), float(streams)))
            losses.append(LOSSES[corpus][row][column])
    return inputs, losses

"""RAG inference scaling: a budget of context spent on documents, demonstrations and rounds of retrieval, by a fitted
model of their worth.

After "Inference Scaling for Long-Context Retrieval Augmented Generation" (arXiv 2410.04343). `retrieval` finds
documents (BM25, vectors, or any callable), `reading` answers from them in one call (`drag`) or in rounds with questions
of its own (`iter_drag`), and `allocation` says which numbers of documents, demonstrations and rounds a budget is best
spent on.
"""

from assay.methods.reasoning.rag_inference_scaling.allocation import (
    Allocation,
    AllocationModel,
    feasible,
    informativeness,
    optimum,
)
from assay.methods.reasoning.rag_inference_scaling.reading import (
    Answered,
    Example,
    Prompts,
    Reader,
    drag,
    effective_length,
    iter_drag,
)
from assay.methods.reasoning.rag_inference_scaling.retrieval import Bm25, Retriever, Vectors, merged

__all__ = [
    "Allocation", "AllocationModel", "Answered", "Bm25", "Example", "Prompts", "Reader", "Retriever", "Vectors", "drag",
    "effective_length", "feasible", "informativeness", "iter_drag", "merged", "optimum",
]  # fmt: skip

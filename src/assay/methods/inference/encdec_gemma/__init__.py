"""Encoder-Decoder Gemma: a decoder-only model adapted into an encoder-decoder (arXiv 2504.06225).

The encoder reads the input both ways with the decoder-only model's weights; the decoder, of the same or a smaller model, answers with
cross-attention added to every layer. What is read is read once: an answer's tokens go through the decoder alone, whose own cache holds the
answer only. The released models are T5Gemma; for Gemma 2 `decoder_to_encdec` returns transformers' class for them, for models built as
Llama (Llama, Mistral, Qwen, Gemma 3, ...) an `EncDecForSeq2SeqLM`.

    model = decoder_to_encdec(llama, decoder_start_token_id=bos)          # balanced: cross-attention starts as self-attention
    model = decoder_to_encdec(llama, fewer_layers(llama))                 # half the depth for answers
    model = decoder_to_encdec(large, small, cross_init="random")          # then CrossAttentionWarmup
    trainer = Trainer(model, ..., data_collator=PrefixLMCollator(pad), callbacks=[CrossAttentionWarmup(1000)])
    EncDecForCausalLM.of(model).save_pretrained(folder)                   # for `assay serve` and whoever continues prompts

Source: the paper, and T5Gemma's architecture as transformers has it. `our choice`: the norms of a copied cross-attention are copied too,
and train in the warm-up.

When NOT to use it: without training, which is what makes the adapted model better; for models whose attention has sinks or the like, which
are refused; where prompts grow turn by turn, since each turn is encoded from its beginning.
"""

from assay.methods.inference.encdec_gemma.conversion import (
    decoder_to_encdec,
    fewer_layers,
    from_t5gemma,
    t5gemma_config,
)
from assay.methods.inference.encdec_gemma.cost import Flops, flops
from assay.methods.inference.encdec_gemma.model import (
    AnswerCache,
    EncDecConfig,
    EncDecForCausalLM,
    EncDecForSeq2SeqLM,
)
from assay.methods.inference.encdec_gemma.objectives import (
    UL2,
    CrossAttentionWarmup,
    Denoiser,
    PrefixLMCollator,
    UL2Collator,
    cross_parameters,
    distillation,
    distilled_loss,
    freeze_but_cross,
    teacher_logits,
)

__all__ = [
    "UL2",
    "AnswerCache",
    "CrossAttentionWarmup",
    "Denoiser",
    "EncDecConfig",
    "EncDecForCausalLM",
    "EncDecForSeq2SeqLM",
    "Flops",
    "PrefixLMCollator",
    "UL2Collator",
    "cross_parameters",
    "decoder_to_encdec",
    "distillation",
    "distilled_loss",
    "flops",
    "freeze_but_cross",
    "from_t5gemma",
    "fewer_layers",
    "t5gemma_config",
    "teacher_logits",
]

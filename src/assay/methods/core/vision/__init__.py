"""What image models share: how one is built by name, its blocks, windows of attention, and what makes it cheaper.

registry.py        @backbones and build: one table of configurations in each paper's file; features_only; registration into timm
backbone.py        what every backbone offers: forward_features, forward_head, stages by stride, reset_classifier
weights.py         state dicts of others' layouts into ours, exact in keys and shapes
blocks.py          DropPath, channel norms, Conv-norm-activation, MLP, patch merging, squeeze and excite
pyramid.py         what Swin's kin share: patches, stages of blocks, merging between them
windows.py         partition into windows, relative position bias, the mask of a shift, window attention
folding.py         BatchNorm folded into the convolutions before it, found by running the model
int8_conv.py       convolutions in 8 bits
token_merging.py   fewer tokens from block to block
running.py         which of a model's layers run, in what order and at which sizes
"""

"""ETS, efficient tree search: prune a tree of reasoning steps so that what goes on shares its keys and values (arXiv 2502.13575).

    generator = TreeGenerator(model, tokenizer)
    found = tree_search(generator, verifier, prompt, sampling, width=16, select=Ets(embed=embed))
    answer = weighted([extract(trace.text) for trace in found.traces], [trace.score for trace in found.traces])

A search that is guided by a process reward keeps many branches, and each holds keys and values of its own. REBASE shares the
next steps out by reward alone. ETS first solves a small integer programme that takes leaves for their reward, charges for every
node they hold in the cache, shared ones once, and pays for covering different steps (clusters of embeddings).

- `selecting`: the programme, REBASE's allocation, the clusters; `searching`: the search, on the shared `Trace`, `Generator` and `Verifier`.
- `trie`, `generating`: a generator whose cache is the tree, each token held once, pruned when the search prunes.

The mechanism follows the released code (SqueezeAILab/ETS), where the cost of a node is 1; costs in tokens are an option. There,
a lambda_c of 0 becomes a small reward for keeping nodes; here it keeps all, which is the same.

When NOT to use it: for answers in one step, without a verifier that tells good steps from bad ones, and where the cache does not limit what
runs at once.
"""

from assay.methods.reasoning.ets.generating import TreeGenerator
from assay.methods.reasoning.ets.searching import Round, Searched, tree_search, tree_tokens
from assay.methods.reasoning.ets.selecting import Beam, Ets, Rebase, Select, choose, clusters_of, rebase_counts
from assay.methods.reasoning.ets.trie import KeyValueTrie, Reading, attend

__all__ = [
    "Beam",
    "Ets",
    "KeyValueTrie",
    "Reading",
    "Rebase",
    "Round",
    "Searched",
    "Select",
    "TreeGenerator",
    "attend",
    "choose",
    "clusters_of",
    "rebase_counts",
    "tree_search",
    "tree_tokens",
]

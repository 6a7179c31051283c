"""Several named adapters on one base, and their arithmetic.

adapters = jlora.add(params, "german", jlora.peft.load("german", params))
adapters = jlora.add(adapters, "french", jlora.peft.load("french", params))
logits = apply(jlora.activate(adapters, "french").params, ids)
blend = jlora.weighted(adapters, {"german": 0.7, "french": 0.3})

bank = jlora.bank([adapters["german"], adapters["french"]])
logits = jlora.mixed(apply)(jlora.with_ids(bank, [0, 1, -1]), ids)

_set        the set: the base once, the adapters by name, which are active
_parts      an adapter without its base, put on again, several on one kernel
_edit       add, activate, disable, rename, remove, update
_same_base  whether a tree stands on a set's base
_pad        adapters of a lower rank as ones of a higher
_weighted   sums of adapters, leaf by leaf
_terms      the sum of the terms of one kernel, exact, DoRA's too
_compress   terms of a lower rank, by QR and SVD
_sparse     TIES, DARE and magnitude pruning
_bank       several adapters stacked, and one of them again
_mixed      functions of batches in which every example names its adapter
_generation the same of the steps of generation
"""

"""One file a dialect: `claim` tells a tensor's module and role, `names` the canonical names, `write` makes a file.

A dialect never computes: `_families` turns roles (down, up, alpha, lokr_w1 ...) into factors, `_names` and `_native`
turn a trainer's module names into canonical ones, `_foreign` knows what cannot be merged and why.
"""

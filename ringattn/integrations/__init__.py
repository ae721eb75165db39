"""ringattn inside other people's training code. Each module imports its package; this one nothing.

`shards` is what they share: a batch as a single process would have it, cut for a rank, with everything attention has to know
about the whole sequence beside it. What is on the other side of each interface is tested with the real package.
"""

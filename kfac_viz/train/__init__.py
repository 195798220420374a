"""Training with the very objects of `method`: what is averaged, when it is renewed, and how far to go.

`optimizer` has the order of things. It is made of `options`, what one may choose; `statistics`, what is remembered of
batches; `curvature`, when that becomes a preconditioner; `layout`, where parameters lie in a flat vector; `update`, how
long a step is; `plain`, the rule where there is no curvature; `step`, what a step does to each parameter; `trial`, the
loss that judges it; and `state`, saving all of it. Of several processes, `distributed` has what they tell each other,
and `shards` the batch that they have captured in parts.
"""

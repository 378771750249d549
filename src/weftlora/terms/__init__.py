"""The terms of the equation: five axes, on each of which an adapter makes one choice, and each choice is one file.

    y = x Wᵀ + b + h B̃ᵀ        h = ω(x) ⊗ (g ⊙ drop(x) Aᵀ)        B̃ = [v ⊙ B | Ū]        (`weftlora.kernel`)

    structure   who owns A and B, the router ω, the vectors u and v      Plain · Hydra · Tied
    start       where A and B start, and the frozen twins of a later one Kaiming · Directions
    boost       extra slots Ū, V̄ along directions of W                   none · Dash
    ranks       a 0/1 mask in g, slots moved between sites               Uniform · Reallocate
    layers      a scalar per block in g, which blocks have a site        All · Only · Search

Every paper's method is a point in that space:

    LoRA              arXiv 2106.09685   Plain, and the default of every other axis: ΔW = (α/r) B A
    HydraLoRA         arXiv 2404.19245   Hydra: one A, N heads B_n side by side in B, ω = softmax(x Wgᵀ)
    Tied-LoRA         arXiv 2311.09578   Tied: A and B of a whole group of sites, u in g, v on the rows of B
    LoRA-Dash         arXiv 2409.01035   Plain + Dash: s slots whose Ū, V̄ are launched after t steps, their gains learned from 0
    LoRA-Init         arXiv 2409.01035   Plain + Directions: at step t A, B ← A₀, B₀, and slots −A₀, B₀ that cancel them
    LoRA-TSD          arXiv 2409.01035   Plain + Directions + Dash, ranked once
    Allocating LoRA   arXiv 2403.16187   Plain + Reallocate: the mask moves by scores measured on validation rows
    Flexora           arXiv 2408.10774   Plain + Search: the layer gate is α̂, trained on held-out rows; then Only the selected

What does not follow from these choices is a new choice: a class that implements the protocol of its axis (`structure`, `start`,
`boost`, `ranks`, `layers`: the protocol is the package's own file, the choices stand beside it). A choice answers for itself (what
it builds and saves, how it exports or why not, what it refuses, what happens over time because of it), and nothing outside of
this package asks which choice it is. Choices never import each other; `weftlora.terms.axes` lists them, `weftlora.adapter.site`
puts one of each together.
"""

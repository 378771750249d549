"""What happens when: controllers that measure, decide and apply, driven by optimiser steps that nobody has to count.

The training loop as pseudo-code, with who acts when. Nothing here runs; it is the map of this package.

    model = get_peft_model(base, config)        host      sites are built; the first site of an adapter gets its Schedule
    [weftlora.attach(model, total_steps=...)]   host      for times in fractions or epochs, and validation rows; our trainer and
                                                          weftlora.Callback in anybody's do it

    for batch in data:
        loss = model(**batch).loss              site      y = x Wᵀ + h B̃ᵀ; no counter, no side effect
        loss.backward()                         kernel
        optimizer.step()                        torch     ─┐ a global hook after every real optimiser step
            Schedule.after_step                 clock      ├─ +1 if this optimiser holds the adapter's anchor parameter
            ├─ controller.plan                  launch     ├─ at step t: measure → decide, for all who are due …
            │                                   reallocate │  (at each round's step: score slots, decide)
            └─ its apply                                   └─ … and only then apply
        optimizer.zero_grad()

    pre-launch  step 1 … t        Dash slots exist with Ū = V̄ = 0: contribution and gradient exactly 0. So do the twins of LoRA-Init
    ranking     after step t      change rates of every W (fp64), one decomposition per W however many are due
    launch                        Dash: directions fixed, moments of the gains dropped
    switch                        LoRA-Init: A, B and, bit for bit, their frozen twins set; moments of A and B dropped
    afterwards  step t+1 …        gains are trained from 0, A and B from A₀ and B₀; directions and twins are buffers, saved, never
                                  chosen again
    rounds      after t₁, t₂, …   rank slots are scored on validation rows and moved between sites (weftlora.attach gives the rows)

State: the step count is a buffer of the adapter's first site, phase and directions are buffers of every site. All of it is in
every checkpoint that holds the adapter, so a resumed run continues where it was.
"""

from __future__ import annotations

"""The training loop as pseudo-code, with who acts when. Nothing here runs; it is the map of this package.

    model = get_peft_model(base, config)        glue      sites are built; the first site of an adapter gets its Schedule
    [weft.attach(model, total_steps=...)]       glue      for times in fractions or epochs, validation rows; our trainer does it

    for batch in data:
        loss = model(**batch).loss              site      y = x Wᵀ + h B̃ᵀ; no counter, no side effect
        loss.backward()                         kernel
        optimizer.step()                        torch     ─┐ a global hook after every real optimiser step
            Schedule.after_step                 clock      ├─ +1 if this optimiser holds the adapter's anchor parameter
            ├─ controller.after_step            dash       ├─ at step t: measure → decide → apply, site by site
            └─ controller.after_step            reallocate └─ at each round's step: score slots, decide, move
        optimizer.zero_grad()

    pre-launch  step 1 … t        Dash slots exist with Ū = V̄ = 0: contribution and gradient exactly 0
    launch      after step t      change rates of every W (fp64), directions fixed, moments of the gains dropped
    dash        step t+1 …        gains are trained from 0; directions are buffers, saved, never chosen again

rounds      after step t₁, t₂, …     rank slots are scored on validation rows and moved between sites (weft.attach gives the rows)

State: the step count is a buffer of the adapter's first site, phase and directions are buffers of every site. All of it is in
every checkpoint that holds the adapter, so a resumed run continues where it was.
"""

"""Log-probs of targets without logits: api (checks, the loop over chunks, gradients), statistics (of a row of logits,
and how those of slices merge), tiles (their sizes), xla (every platform), tpu and triton (Pallas)."""

"""Adversarial attacks and the losses of robust training: pure functions of `logits = f(x)`."""
